"""Every position goes through its expert, and in decoding its result does not hang on how many others there are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmtp.nn.experts import ExpertNorm, Experts, Routes
from mmtp.nn.mlp import SwiGLU

NAMES = ("one", "two", "three")
CPU = torch.device("cpu")
indices = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def experts() -> list[Experts]:
    torch.manual_seed(0)
    norm = ExpertNorm(NAMES, 8, 1e-6)
    for gain in norm.parameters():
        nn.init.uniform_(gain, 0.5, 2)
    return [Experts(NAMES, lambda: SwiGLU(8, 16)), Experts(NAMES, lambda: nn.Linear(8, 5)), norm]


@settings(max_examples=30, deadline=None)
@given(indices)
def test_each_position_takes_its_expert(index: list[int]) -> None:
    routes = Routes.of(torch.tensor([index]), 3)
    x = torch.randn(1, len(index), 8)
    for module in experts():
        found = module(x, routes)
        wanted = torch.stack([module[NAMES[expert]](x[0, i]) for i, expert in enumerate(index)])[None]
        torch.testing.assert_close(found, wanted)
        own = torch.autograd.grad(found.square().sum(), list(module.parameters()))
        same = torch.autograd.grad(wanted.square().sum(), list(module.parameters()), allow_unused=True)
        for one, other in zip(own, same, strict=True):  # of experts without positions as well
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@settings(max_examples=30, deadline=None)
@given(indices, st.integers(1, 12))
def test_windows_of_decoding_agree_to_the_bit(index: list[int], cut: int) -> None:
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(len(index)))
    kinds = (index * 16)[:16]
    for module in experts():
        with torch.no_grad():
            whole = module(x, Routes.of_window(kinds, 3, CPU))
            torch.testing.assert_close(whole, module(x, Routes.of(torch.tensor([kinds]), 3)))
            part = module(x[:, :cut], Routes.of_window(kinds[:cut], 3, CPU))
        assert cut < 4 or torch.equal(part, whole[:, :cut])


def test_more_than_one_row_and_axes_behind() -> None:
    index = torch.tensor([[0, 1, 1], [2, 0, 1]])
    norm, x = experts()[2], torch.randn(2, 3, 4, 8)
    found = norm(x, Routes.of(index, 3))
    assert torch.allclose(found[1, 0], norm["three"](x[1, 0])) and torch.allclose(found[0, 2], norm["two"](x[0, 2]))
    alone = norm(x, Routes.of_window([1] * 6, 3, CPU))
    assert torch.allclose(alone, norm["two"](x))


@pytest.mark.parametrize("count", [2, 5])
def test_a_lone_expert_takes_all(count: int) -> None:
    routes = Routes.of_window([1] * count, 3, CPU)
    assert routes.sole == 1 and not routes.groups
