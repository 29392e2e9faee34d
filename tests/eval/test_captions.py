import pytest
import torch

from mmtp.eval.captions import (
    CONSTANT,
    NEAREST,
    OTHER_PICTURE,
    PICTURE,
    Captioned,
    best_constant,
    elsewhere,
    evaluate_captions,
    nearest_pictures,
    token_f1,
)


@pytest.mark.parametrize(
    ("said", "wanted", "f1"),
    [
        ("red fox", "Red Fox!", 1.0),
        ("a red fox", "red fox", 0.8),
        ("red red", "red fox", 0.5),
        ("", "fox", 0.0),
        ("", "…", 1.0),
        ("flag: Togo", "flag: Uganda", 0.5),
    ],
)
def test_token_f1(said, wanted, f1):
    assert token_f1(said, wanted) == pytest.approx(f1)


def test_the_best_constant_is_what_most_captions_share():
    assert best_constant(["fox", "flag: Togo", "flag: Peru", "red fox flag"]) == "red fox flag"


def test_the_nearest_picture_is_that_of_the_same_kind():
    bank = torch.zeros(3, 3, 4, 4)
    bank[0, 0], bank[1, 1], bank[2, 2] = 1, 1, 1
    queries = torch.stack([bank[2] * 0.5 + 0.1, bank[0] * 0.8])
    assert nearest_pictures(bank, queries) == [2, 0]
    assert nearest_pictures(bank, queries, lambda p: p[:, :1].mean((2, 3)).repeat(1, 2))[1] == 0


class Knowing:
    """Says the caption that the first pixel stands for."""

    def __init__(self, captions: list[str]) -> None:
        self.captions = captions

    def caption(self, media, *, batch_size: int = 64) -> list[str]:
        return [self.captions[round(float(picture[0, 0, 0]) * 8)] for picture in media]


def test_looking_is_what_makes_the_difference():
    captions = [f"a picture of {name}" for name in ("one", "two", "three", "four")]
    pictures = torch.zeros(4, 3, 4, 4)
    pictures[:, 0] = (torch.arange(4) / 8)[:, None, None]
    pictures[:, 1, 0] = torch.eye(4)
    bank = Captioned(pictures.roll(1, 0), ("a picture of four", "a picture of one", "a picture of two", "a photo"))
    result = evaluate_captions(Knowing(captions), Captioned(pictures, tuple(captions)), bank)
    assert (result.f1(PICTURE), result.exact(PICTURE)) == (1, 1)
    assert (result.f1(OTHER_PICTURE), result.exact(OTHER_PICTURE)) == (0.75, 0)
    assert result.exact(NEAREST) == 0.75
    assert (result.f1(CONSTANT), result.exact(CONSTANT)) == (0.8125, 0.25)
    assert [row[0] for row in result.table().rows] == list(result.to_dict())[1:]


def test_everything_is_elsewhere():
    values = list(range(50))
    moved = elsewhere(values)
    assert sorted(moved) == values
    assert all(a != b for a, b in zip(values, moved, strict=True))
