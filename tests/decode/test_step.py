from inspect import getattr_static
from typing import Protocol

import pytest
import torch

from mmtp.decode.step import SlotLogits, Step
from mmtp.nn import native
from tests.models.common import LAYOUT, model


@pytest.mark.parametrize("depth", [0, 2])
def test_isinstance_asks_for_nothing_that_getattr_alone_finds(depth: int) -> None:
    """From Python 3.12 on it looks without ``__getattr__``, by which torch finds the modules of a module."""
    net = model(depth=depth)
    asked = {*dir(Step), *Step.__annotations__} - {*dir(Protocol)}
    assert {"embed", "extend", "write"} <= asked
    for name in asked - {name for name in asked if name.startswith("_")}:
        getattr_static(net, name)
    assert isinstance(net, Step)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_refiner_reads_the_weights_of_compiled_passes_where_both_are_pairs(compiled: bool, rounded: bool) -> None:
    table = torch.randn(LAYOUT.size, 24, generator=torch.Generator().manual_seed(0))
    table = table.bfloat16().float() if rounded else table
    logits, states = SlotLogits(LAYOUT, table, compiled), torch.randn(3, 24)
    for slot, kind in enumerate(LAYOUT.slots):
        ids = [token for low, high in kind.generable for token in range(low, high)]
        with torch.inference_mode():
            torch.testing.assert_close(logits(states, slot), states @ table[ids].T, atol=1e-4, rtol=1e-4)
        held, found = logits.pairs(slot)
        assert found.tolist() == ids and torch.equal(held, native.pairs(table[ids]))
        again, _ = logits.pairs(slot)
        assert again is held
        assert (logits._packed[slot]._made is held) == (compiled and rounded)
