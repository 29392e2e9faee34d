import pytest
import torch
from torch.nn import functional as F

from mmtp.nn.attention import Attention, attend, document_mask
from mmtp.nn.rope import Rope, rotate


@pytest.mark.parametrize("s", [1, 5, 40])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries_equal_repeated_keys(s: int, groups: int) -> None:
    q, k, v = torch.randn(2, 2 * groups, s, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    mask = torch.rand(2, 1, s, 50) < 0.7
    mask[..., 0] = True
    wanted = F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v, mask), wanted, atol=1e-6, rtol=1e-5)


def test_document_mask_is_causal_inside_documents_and_open_inside_spans() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    mask = document_mask(documents)[0, 0]
    assert mask.tolist() == [[j <= i and documents[0, i] == documents[0, j] for j in range(6)] for i in range(6)]
    spans = torch.tensor([[-1, 3, 3, -1, -1, -1]])
    opened = document_mask(documents, spans)[0, 0]
    assert opened[1, 2]
    assert not opened[0, 1]
    assert (opened ^ mask).sum() == 1


def test_rope_depends_on_distances_alone_on_every_axis() -> None:
    rope = Rope(12, 100.0)
    q, k = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def score(p: list[int], r: list[int]) -> torch.Tensor:
        return (rotate(q, rope(torch.tensor([[p]]))) * rotate(k, rope(torch.tensor([[r]])))).sum()

    torch.testing.assert_close(score([5, 7, 9], [1, 2, 3]), score([15, 27, 109], [11, 22, 103]), atol=1e-5, rtol=1e-4)
    for axis in range(3):
        moved = [5, 5, 5]
        moved[axis] += 3
        assert abs(score(moved, [1, 1, 1]) - score([5, 5, 5], [1, 1, 1])) > 1e-4


@torch.no_grad()
def test_cached_attention_equals_one_pass() -> None:
    from mmtp.decode.cache import KVCache

    layer = Attention(32, 4, 2, 8, 1e-6)
    angles = Rope(8, 100.0)(torch.arange(90)[None, :, None].expand(1, 90, 3))
    x = torch.randn(1, 90, 32)
    whole = layer(x, angles, document_mask(torch.zeros(1, 90, dtype=torch.long)))
    cache, parts = KVCache(1, 1, 2, 8, 300), []
    for start, end in ((0, 1), (1, 6), (6, 70), (70, 90)):
        mask = cache.begin(end - start)
        parts.append(layer(x[:, start:end], (angles[0][:, start:end], angles[1][:, start:end]), mask, cache.layers[0]))
        cache.commit([end - start])
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-5)
