"""Linear layers, with weights laid out for a few rows at a time where a model decodes on a CPU.

A pass of decoding multiplies one to some dozens of rows by every weight. BLAS lays the weights out anew in every call, which for so few
rows costs more than the product itself; oneDNN multiplies by weights that were laid out once. Its kernels also sum in one order whatever
the number of rows, so that a position gets the same numbers in plain and in speculative passes.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

T = TypeVar("T")

ROWS = 8
"""How many rows oneDNN is told to expect. A hint of one would give a layout whose results for one row differ from those for several."""

LEAST = 2**16
"""Numbers in a weight from which packing pays: a call of oneDNN has a cost of its own, about that of a product with so small a weight."""


class Derived:
    """Something made of weights, made anew when they change. Copies start empty."""

    __slots__ = ("_made", "_marks")

    def __init__(self) -> None:
        self._marks: list[tuple[int, int]] | None = None
        self._made: Any = None

    def get(self, weights: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What ``make`` gives for the weights as they are now."""
        marks = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if self._made is None or marks != self._marks:
            self._marks, self._made = marks, make()
        return self._made

    def __reduce__(self) -> tuple[type["Derived"], tuple[()]]:
        return Derived, ()


class Linear(nn.Linear):
    """``nn.Linear``, which in inference mode multiplies by its packed weights once :func:`pack_linears` was called."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.packs = False
        self._packed = Derived()

    def forward(self, input: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        # What is compiled has its own ways with weights, and could not watch them change.
        if self.packs and not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            return packed_linear(input, self.weight, self._packed, self.bias)
        return F.linear(input, self.weight, self.bias)


def pack_linears(model: nn.Module) -> None:
    """Lets every :class:`Linear` of a model use packed weights in inference mode, at the cost of a copy of them."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.packs = True


def packed_linear(
    x: Float[Tensor, "*batch i"], weight: Float[Tensor, "o i"], packed: Derived, bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*batch o"]:
    """``x @ weight.T + bias`` by the packed weight where there is a kernel for it, else as it is."""
    if not _packable(weight) or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    layout = packed.get((weight,), lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS))
    return torch.ops.mkldnn._linear_pointwise.default(x, layout, bias, "none", [], "")


def _packable(weight: Tensor) -> bool:
    """Whether oneDNN has a kernel for it that pays."""
    return weight.numel() >= LEAST and weight.dtype in _DTYPES and weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter)


def _packed_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


_DTYPES = _packed_dtypes()
