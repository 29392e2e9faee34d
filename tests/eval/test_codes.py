import math

import pytest
import torch

from mmtp.eval.codes import CodeCounts, EvalError, count_codes, entropy
from mmtp.testing.fakes import BlockTokenizer
from mmtp.types import Codes


def test_entropy_of_known_shares():
    assert entropy(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(2.0)
    assert entropy(torch.tensor([9, 0])) == pytest.approx(0.0)
    assert entropy(torch.tensor([1, 3])) == pytest.approx(2 - 0.75 * math.log2(3))


def test_valid_codes_are_counted_per_codebook():
    ids = torch.tensor([[[0, 1, 2, 3], [0, 0, 1, 1]], [[3, 3, 0, 0], [1, 1, 0, 0]]])  # the second item has two frames
    counts = CodeCounts((8, 2))
    counts.add(Codes(ids, torch.tensor([[4], [2]])))
    assert [count.tolist() for count in counts.counts] == [[1, 1, 1, 3, 0, 0, 0, 0], [2, 4]]
    assert counts.tokens == 12
    assert counts.bits == 6 * 3 + 6 * 1
    assert counts.usages == [0.5, 1.0]
    assert counts.perplexities == [2 ** entropy(count) for count in counts.counts]
    assert counts.figures()["entropy_bits"] == pytest.approx(sum(counts.entropies) / 2)
    assert counts.table().rows[1] == ["1", 2, "100.0 %", "1.9", "0.92 of 1.00 bits"]


@pytest.mark.usefixtures("block_registered")
def test_a_set_is_counted_without_decoding(monkeypatch):
    tokenizer = BlockTokenizer(BlockTokenizer.Config(block=4, levels=5))
    monkeypatch.setattr(BlockTokenizer, "decode", lambda *_: pytest.fail("decoded"))
    pictures = [torch.full((3, 8, 8), shade / 4) for shade in range(4)]
    counts = count_codes(tokenizer, iter(pictures), batch=3)
    assert [count.tolist() for count in counts.counts] == [[4, 4, 4, 4, 0]] * 3
    with pytest.raises(EvalError, match="nothing to measure"):
        count_codes(tokenizer, [])
