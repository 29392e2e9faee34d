import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

from mmtp.nn.attention import Attention, attend, document_blocks, document_mask
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 70), st.sampled_from([1, 3]), st.sampled_from([0, 0, 1, 2, 7, 30]))
def test_blocks_and_booleans_are_one_mask(data: st.DataObject, s: int, groups: int, window: int) -> None:
    ids = st.lists(st.integers(0, 3), min_size=s, max_size=s)
    documents = torch.tensor([data.draw(ids.map(sorted)) for _ in range(2)])
    documents[1, s // 2 + 1 :] = -1
    spans = torch.tensor([data.draw(ids) for _ in range(2)]) - 2
    until = torch.maximum(torch.arange(s) - torch.tensor([data.draw(ids) for _ in range(2)]), torch.zeros(2, s, dtype=torch.long))
    q, k, v = torch.randn(2, 2 * groups, s, 16), torch.randn(2, 2, s, 16), torch.randn(2, 2, s, 16)
    for spanned, last in ((None, None), (spans, None), (spans, until), (None, until)):
        whole, blocks = (make(documents, spanned, last, window) for make in (document_mask, document_blocks))
        assert torch.equal(create_mask(blocks.mask_mod, 2, None, s, s, device="cpu"), whole)
        if last is not None or window:
            for row, query, key in torch.cartesian_prod(torch.arange(2), torch.arange(s), torch.arange(s))[:: s // 2 + 1].tolist():
                together = spanned is not None and 0 <= spanned[row, query] == spanned[row, key]
                before = query - (window or s) < key <= (query if last is None else last[row, query])
                assert whole[row, 0, query, key] == (documents[row, query] == documents[row, key] and (before or together))
        if last is not None:
            continue  # rows of such masks may be empty
        torch.testing.assert_close(attend(q, k, v, blocks), attend(q, k, v, whole), atol=2e-6, rtol=1e-5)


@pytest.mark.gpu
def test_flex_attention_learns_what_sdpa_does() -> None:
    q, k, v = (torch.randn(2, h, 300, 64, device="cuda", requires_grad=True) for h in (4, 2, 2))
    documents = torch.arange(300, device="cuda").div(70, rounding_mode="floor").expand(2, 300)
    grads = []
    for mask in (document_mask(documents), document_blocks(documents)):
        grads.append(torch.autograd.grad(attend(q, k, v, mask).square().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


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
