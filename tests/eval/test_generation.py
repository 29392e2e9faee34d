import pytest
import torch

from mmtp.eval.generation import evaluate, judge, labelled_pictures
from mmtp.eval.shapes import PALETTE, draw
from mmtp.types import Codes


def paint(colour: str, shape: str) -> torch.Tensor:
    cover = torch.from_numpy(draw(shape, (18.0, 20.0, 40.0, 42.0), (64, 64))).float()
    ink = torch.tensor(PALETTE[colour]).view(3, 1, 1) / 255
    return cover * ink + (1 - cover) * 0.95


class Painter:
    """Draws what is asked for, but for one thing that it never learnt, and one picture per seed 1 that it leaves empty."""

    def try_draw(self, captions, samplings, *, max_new_tokens, candidates):
        out = []
        for caption, seed in zip(captions, [sampling.seed for sampling in samplings], strict=True):
            _, colour, shape = caption.split()
            if colour == "teal":
                colour = "blue"
            out.append(torch.full((3, 64, 64), 0.95) if seed == 1 and caption == "a red circle" else paint(colour, shape))
        return out


def test_every_colour_and_shape_is_drawn_and_judged():
    told = []
    result = evaluate(Painter(), seeds=2, batch_size=7, progress=lambda *state: told.append(state))
    assert told[-1] == (48, 48) and len(result.drawings) == 48
    assert result.count("teal").share == 0.0 and result.count("blue").share == 1.0
    assert (result.count("red", "circle").right, result.count("red", "circle").total) == (1, 2)
    assert result.accuracy == pytest.approx(41 / 48)
    shares = result.shares()
    assert shares["shape"] == pytest.approx(47 / 48) and shares["both"] == result.accuracy
    table = result.table()
    assert table.rows[-1][0] == "all" and table.rows[-1][-1] == "85.4 %"
    shown = result.pictures(limit=5)
    assert len(shown.images) == 5 and shown.labels[0] == "black circle"
    assert result.to_dict()["by_colour"]["teal"] == 0.0


class Blanks:
    """A tokenizer that loses everything."""

    def encode(self, media):
        return Codes(torch.zeros(len(media), 1, 8, 8, dtype=torch.int64), torch.full((len(media), 2), 8))

    def decode(self, codes):
        return [torch.ones(3, 64, 64) for _ in range(len(codes))]


def test_real_pictures_are_judged_as_they_are_and_through_a_tokenizer():
    samples = [
        ({"color": "red", "shape": "circle"}, paint("red", "circle")),
        ({"shape": "triangle"}, paint("teal", "triangle")),
        ({}, paint("gray", "rectangle")),
    ]
    told = []
    assert judge(samples, batch_size=2, progress=lambda *state: told.append(state)).accuracy == 1.0
    assert told == [(2, 3), (3, 3)]
    assert judge(samples, Blanks()).accuracy == 0.0


def test_labelled_pictures_are_read_right_by_the_parser():
    pytest.importorskip("easy_vqa")
    result = judge(labelled_pictures("easy-vqa:train", limit=60))
    assert len(result.drawings) == 60 and result.accuracy == 1.0


class Stubborn(Painter):
    """Never finishes one of the pictures."""

    def try_draw(self, captions, samplings, *, max_new_tokens, candidates):
        pictures = super().try_draw(captions, samplings, max_new_tokens=max_new_tokens, candidates=candidates)
        return [None if caption == "a green triangle" else picture for caption, picture in zip(captions, pictures, strict=True)]


def test_what_is_not_finished_counts_as_wrong_and_stops_nothing():
    result = evaluate(Stubborn(), seeds=1)
    assert result.count("green", "triangle").right == 0
    assert result.count("green").right == 2 and result.accuracy == pytest.approx(20 / 24)


def test_time_that_is_up_ends_after_whole_batches():
    assert len(evaluate(Painter(), seeds=5, max_seconds=0.0).drawings) == 24
