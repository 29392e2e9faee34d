import pytest
import torch

from mmtp.eval.codes import CodeCounts, perplexity
from mmtp.types import Codes


def test_perplexity_counts_codes_that_are_used_evenly():
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([9, 0])) == pytest.approx(1.0)


def test_valid_codes_are_counted_per_codebook():
    ids = torch.tensor([[[0, 1, 2, 3], [0, 0, 1, 1]], [[3, 3, 0, 0], [1, 1, 0, 0]]])  # the second item has two frames
    counts = CodeCounts((8, 2))
    counts.add(Codes(ids, torch.tensor([[4], [2]])))
    assert [count.tolist() for count in counts.counts] == [[1, 1, 1, 3, 0, 0, 0, 0], [2, 4]]
    assert counts.tokens == 12
    assert counts.bits == 6 * 3 + 6 * 1
    assert counts.usages == [0.5, 1.0]
    assert counts.perplexities == [perplexity(count) for count in counts.counts]
