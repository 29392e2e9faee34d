"""How much memory tensors take at most while a piece of code runs, and modules whose weights take none."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages that are made inside of it and are alive at the same time.

    Args:
        beside: tensors made before that are not counted; others are, once a view of them is taken.

    Attributes:
        peak: the greatest count so far.
    """

    def __init__(self, beside: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in beside}

    @property
    def live(self) -> int:
        """The present count."""
        return sum(self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, key, None)
        self.peak = max(self.peak, self.live)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are made inside have parameters of shape alone, on the meta device; buffers hold their numbers, as ever."""

    def bare(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(bare)  # pyrefly: ignore  # typed as if it gave nothing
    try:
        yield
    finally:
        handle.remove()
