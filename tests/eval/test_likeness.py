from collections.abc import Sequence

import pytest
import torch

from mmtp.decode.sample import Sampling
from mmtp.eval.features import FeatureNetwork
from mmtp.eval.likeness import COMMONEST, DRAWN, OTHER_CAPTION, REAL, RECONSTRUCTED, Judged, evaluate_likeness
from mmtp.testing.fakes import BlockTokenizer
from tests.eval.sight import colours

COLOURS = {"red": 0, "green": 1, "blue": 2}


def paint(colour: str, seed: int) -> torch.Tensor:
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 0.3
    picture[COLOURS[colour]] += 0.6
    return picture


def judged(number: int, seed: int) -> Judged:
    names = tuple(list(COLOURS)[i % 3] for i in range(number))
    sizes = ["large" if i % 4 else "small" for i in range(number)]
    return Judged(torch.stack([paint(n, seed + i) for i, n in enumerate(names)]), names, {"colour": names, "size": sizes})


class Painter:
    """Draws what it is asked for, but finishes only so many of its drawings."""

    def __init__(self, finished: int) -> None:
        self.finished, self.seeds = finished, list[int]()

    def try_draw(self, captions: Sequence[str], samplings: Sequence[Sampling], *, max_new_tokens: int, candidates: int):
        self.seeds += [s.seed for s in samplings]
        return [paint(c, 900 + s.seed) if s.seed < self.finished else None for c, s in zip(captions, samplings, strict=True)]


def look(painter: Painter):
    network = FeatureNetwork("colours", colours)
    tokenizer = BlockTokenizer.Config(block=16, levels=3).build()
    return evaluate_likeness(painter, tokenizer, network, judged(12, 0), judged(30, 100), batch_size=5)


def test_the_judge_reads_what_is_drawn_and_counts_what_is_not_finished():
    painter = Painter(9)
    result = look(painter)
    assert painter.seeds == list(range(12))
    assert result.shares[REAL]["colour"] == result.shares[RECONSTRUCTED]["colour"] == 1
    assert result.shares[DRAWN]["colour"] == 9 / 12
    assert result.shares[OTHER_CAPTION]["colour"] < 0.6
    assert result.shares[COMMONEST]["colour"] == pytest.approx(1 / 3)
    assert result.shares[COMMONEST]["size"] == 0.75
    assert result.frechet[DRAWN] < 1 and set(result.frechet) == {RECONSTRUCTED, DRAWN}
    assert result.to_dict()["unfinished"] == 3
    assert [row[0] for row in result.table().rows] == [REAL, RECONSTRUCTED, DRAWN, OTHER_CAPTION, COMMONEST]
    assert len(result.pictures().images) == 9


def test_a_model_that_draws_nothing_has_nothing_right():
    result = look(Painter(0))
    assert result.shares[DRAWN] == {"colour": 0, "size": 0}
    assert DRAWN not in result.frechet


class Greenish:
    """A tokenizer whose round trip leaves half of every colour, and more green than there was."""

    def encode(self, pictures):
        return pictures

    def decode(self, codes):
        return [0.5 * picture + torch.tensor([0.0, 0.45, 0.0])[:, None, None] for picture in codes]


def test_the_judge_knows_what_the_tokenizer_leaves_of_pictures():
    network = FeatureNetwork("colours", colours)
    result = evaluate_likeness(Painter(12), Greenish(), network, judged(12, 0), judged(60, 100), batch_size=5)
    assert result.shares[REAL]["colour"] == result.shares[RECONSTRUCTED]["colour"] == 1
