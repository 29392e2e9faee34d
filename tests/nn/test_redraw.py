"""Samples of rows in one call: what is kept, and what is drawn in its place."""

import pytest
import torch

from mmtp.nn.redraw import redraw


def sampled(weights: torch.Tensor, number: float) -> int:
    sums = weights.double().cumsum(0)
    return int(torch.searchsorted(sums, number * sums[-1], right=True))


@pytest.mark.parametrize("outputs", [1, 7, 33, 200])
def test_tokens_are_those_of_the_maximal_coupling(outputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    scores, before = 2 * torch.randn(2, 120, outputs, generator=generator)
    before = before.softmax(1)
    ids = torch.randint(outputs, (120,), generator=generator).tolist()
    drawn = [None if i % 4 == 0 else (x, None if i % 4 == 1 else before[i]) for i, x in enumerate(ids)]
    numbers = [(keep, draw) for keep, draw in torch.rand(120, 2, generator=generator).tolist()]
    tokens, p = redraw(scores, drawn, numbers)
    torch.testing.assert_close(p, scores.softmax(1))
    for token, row, each, (keep, draw) in zip(tokens, p, drawn, numbers, strict=True):
        if each is None:
            assert token == sampled(row, draw)
            continue
        x, of = each[0], torch.nn.functional.one_hot(torch.tensor(each[0]), outputs).float() if each[1] is None else each[1]
        if keep * of[x] < row[x]:
            assert token == x
        else:
            assert token == sampled((row - of).clamp(min=0), draw) != x


def test_rows_are_read_wherever_they_stand() -> None:
    scores = torch.randn(5, 24)[:, ::2]
    before = torch.randn(24).softmax(0)[::2]
    drawn, numbers = [(3, before)] * 5, [(0.9, 0.4)] * 5
    whole = redraw(scores.contiguous(), [(3, before.contiguous())] * 5, numbers)
    assert redraw(scores, drawn, numbers)[0] == whole[0]
