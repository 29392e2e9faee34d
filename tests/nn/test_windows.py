import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmtp.nn.attention import LONGEST, attend, document_mask
from mmtp.nn.windows import GAIN, Windows


def heads(b: int, s: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, keys and values, of two groups."""
    return [torch.randn(b, s, h, 16, dtype=dtype).transpose(1, 2).requires_grad_() for h in (4, 2, 2)]


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(8, 90), st.sampled_from([0, 0, 1, 5, 20]))
def test_documents_in_windows_attend_as_in_rows(data: st.DataObject, s: int, seen: int) -> None:
    documents = torch.tensor([data.draw(st.lists(st.integers(0, 9), min_size=s, max_size=s).map(sorted)) for _ in range(2)])
    documents[1, -data.draw(st.integers(1, s)) :] = -1
    if data.draw(st.booleans()):  # as where queries stand behind the row
        documents[0] = documents[0].roll(s // 3)
    places = torch.arange(s)
    spans = torch.where(places % 5 < 3, places // 5, -1).expand(2, s)
    until = (places - places % 4 + 3).expand(2, s)
    for spanned, last in ((None, None), (spans, None), (spans, until)):
        windows = Windows.of(documents, spanned, last, seen)
        if windows is None:
            continue
        assert windows.index.numel() * windows.index.shape[1] <= GAIN * documents.numel() * s
        qkv = heads(2, s)
        goal = torch.randn(2, 4, s, 16) * (documents >= 0)[:, None, :, None]
        rows = attend(*qkv, document_mask(documents, spanned, last, seen))
        wanted = torch.autograd.grad((rows * goal).sum(), qkv)
        for each in (windows, windows.biased(torch.float32)):
            out = attend(*qkv, each)
            torch.testing.assert_close(torch.where(goal != 0, out, 0), torch.where(goal != 0, rows, 0), atol=2e-6, rtol=1e-5)
            for one, other in zip(torch.autograd.grad((out * goal).sum(), qkv), wanted, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_windows_are_as_long_as_the_longest_document() -> None:
    documents = torch.tensor([[0] * 30 + [1] * 20 + [2] * 10 + [3] * 4, [0] * 25 + [-1] * 39])
    windows = Windows.of(documents)
    assert windows is not None
    assert windows.index.shape == (5, 30)
    assert Windows.of(torch.zeros(2, 64, dtype=torch.long)) is None
    assert Windows.of(torch.tensor([[0] * 60 + [1] * 4])) is None


def test_products_round_no_worse_than_the_kernel() -> None:
    """In bfloat16, against float64: what is read, and the gradients of queries, keys and values."""
    qkv = heads(2, 96, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    mask = document_mask(torch.arange(96).div(40, rounding_mode="floor").expand(2, 96))
    goal = torch.randn(2, 4, 96, 16)

    def all_of(inputs: list[torch.Tensor], out: torch.Tensor) -> list[torch.Tensor]:
        return [out, *torch.autograd.grad((out * goal).sum(), inputs)]

    wanted = all_of(exact, F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True))
    kernel = all_of(qkv, F.scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=True))
    ours = all_of(qkv, attend(*qkv, mask))
    assert not torch.equal(ours[0], kernel[0])
    for one, other, truth in zip(ours, kernel, wanted, strict=True):
        assert (one.double() - truth).norm() < 2 * (other.double() - truth).norm() < 0.02 * truth.norm()
    long = heads(1, LONGEST + 1, torch.bfloat16)
    assert torch.equal(attend(*long, None), F.scaled_dot_product_attention(*long, enable_gqa=True))
