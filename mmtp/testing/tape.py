"""A stand-in for CUDA graphs on machines without an accelerator: operations recorded, and run again on the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Records the operations that run inside of it. As with a CUDA graph, what Python does between them is not run again: each reads and
    writes where it did, and only what stands there may have changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        """Runs them all again."""
        for func, args, kwargs, out in self._calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                # Views are of memory that has just been written, and what is changed in place is there already.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """In place of :func:`mmtp.nn.graphs.record`."""
    run()
    tape = Tape()
    with tape:
        out = run()

    def replay() -> Tensor:
        tape.play()
        return out

    return replay
