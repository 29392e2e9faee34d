from inspect import getattr_static
from typing import Protocol

import pytest

from mmtp.decode.step import Step
from tests.models.common import model


@pytest.mark.parametrize("depth", [0, 2])
def test_isinstance_asks_for_nothing_that_getattr_alone_finds(depth: int) -> None:
    """From Python 3.12 on it looks without ``__getattr__``, by which torch finds the modules of a module."""
    net = model(depth=depth)
    asked = {*dir(Step), *Step.__annotations__} - {*dir(Protocol)}
    assert {"embed", "extend", "write"} <= asked
    for name in asked - {name for name in asked if name.startswith("_")}:
        getattr_static(net, name)
    assert isinstance(net, Step)
