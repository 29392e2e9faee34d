"""Cross-attention with closed gates changes nothing; a position reads the last span before it in its document, and no other."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.nn.cross import CrossBlock, last_span_mask


def block(opened: bool = True) -> CrossBlock:
    torch.manual_seed(0)
    made = CrossBlock(16, 4, 2, 8, 32)
    if opened:
        for gate in (made.attention_gate, made.mlp_gate):
            torch.nn.init.constant_(gate, 0.7)
    return made


def test_closed_gates_change_nothing_and_learn_to_open() -> None:
    made, x, memory = block(opened=False), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    out = made(x, memory, mask)
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert made.attention_gate.grad.any() and made.mlp_gate.grad.any()


def test_nothing_to_read_is_an_empty_row() -> None:
    made, x = block(), torch.randn(1, 4, 16)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert torch.equal(made(x, torch.randn(1, 4, 16), mask), made(x, None, None))
    mask[:, :, 2:, 0] = True
    memory = torch.randn(1, 4, 16)
    before = made(x, memory, mask)
    memory[:, 0] = torch.randn(16)
    assert (before != made(x, memory, mask)).any(-1)[0].tolist() == [False, False, True, True]


runs = st.lists(st.tuples(st.booleans(), st.integers(1, 3)), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(runs, min_size=1, max_size=3))
def test_the_last_span_of_the_document_is_seen(documents: list[list[tuple[bool, int]]]) -> None:
    """Against the same said position by position."""
    spans, ids, number = [], [], 0
    for document, pieces in enumerate(documents):
        for inside, length in pieces:
            number += inside
            spans += [number if inside else -1] * length
            ids += [document] * length
    mask = last_span_mask(torch.tensor([spans]), torch.tensor([ids]))[0, 0]
    for query, (own, document) in enumerate(zip(spans, ids, strict=True)):
        before = [span for span, other in zip(spans[:query], ids, strict=False) if span >= 0 and other == document]
        wanted = [own < 0 and bool(before) and span == before[-1] for span in spans]
        assert mask[query].tolist() == wanted
