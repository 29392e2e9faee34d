"""Layers over time that work on a whole sound at once or, where they are causal, on chunks of it as they come.

A layer's output at a step depends on a bounded neighbourhood of its input only, ``padding`` steps before and after. Offline the
neighbourhood is filled up with zeros at both ends; a stream keeps the last inputs in a state instead, so that a chunk goes on where
the one before it ended. Both are the same sums, up to the order in which a kernel of another shape adds them (about 1e-6).
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

State = dict[nn.Module, Tensor]
"""What every layer of a causal network keeps of the past; empty at the start of a stream."""


class TimeLayer(nn.Module):
    """A layer whose ``forward`` takes the state of a stream, or none.

    Attributes:
        padding: steps of the input that an output sees before and after its own.
        rate: steps of output per step of input.
    """

    padding: tuple[int, int] = (0, 0)
    rate: Fraction = Fraction(1)
    __call__: Callable[..., Tensor]

    def padded(self, x: Float[Tensor, "b c t"], state: State | None) -> Float[Tensor, "b c t2"]:
        """The input with its neighbourhood: zeros on both sides offline, the last inputs on the left in a stream."""
        if state is None:
            return F.pad(x, self.padding)
        past = state[self] if self in state else x.new_zeros(*x.shape[:2], self.padding[0])
        x = torch.cat([past, x], -1)
        # A copy: a view would keep the whole chunk in memory.
        state[self] = x[..., x.shape[-1] - self.padding[0] :].clone()
        return x


class Chain(TimeLayer):
    """Layers one after the other; the state of a stream goes to those that have one."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Float[Tensor, "b c *size"], state: State | None = None) -> Float[Tensor, "b c2 *size2"]:
        for layer in self.layers:
            x = layer(x, state) if isinstance(layer, TimeLayer) else layer(x)
        return x


class TimeConv(TimeLayer):
    """A convolution that gives one output per ``stride`` inputs, by kernels that may be weight-normalised.

    Weight normalisation (Salimans and Kingma, arXiv 1602.07868, eq. 2) learns the length of each output's kernel apart from its direction.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        causal: bool,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        weight_norm: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, dilation=dilation, groups=groups)
        self.length = nn.Parameter(_length(self.conv.weight.detach())) if weight_norm else None
        seen = (kernel - 1) * dilation + 1 - stride
        assert seen >= 0, "inputs would be skipped"
        self.padding = (seen, 0) if causal else (seen // 2, seen - seen // 2)
        self.rate = Fraction(1, stride)

    def forward(self, x: Float[Tensor, "b c t"], state: State | None = None) -> Float[Tensor, "b c2 t2"]:
        conv, weight = self.conv, self.conv.weight
        if self.length is not None:
            weight = weight * (self.length / _length(weight))
        return F.conv1d(self.padded(x, state), weight, conv.bias, conv.stride, dilation=conv.dilation, groups=conv.groups)


class Upsample(TimeConv):
    """``factor`` outputs per input: a convolution of ``factor`` times as many channels, dealt out over time.

    With a causal kernel of 2 this is the same linear map as a transposed convolution of kernel ``2 factor`` with its tail cut off, and
    it streams like any convolution (Shi et al., arXiv 1609.07009).
    """

    def __init__(self, inputs: int, outputs: int, factor: int, *, causal: bool, weight_norm: bool = False) -> None:
        super().__init__(inputs, outputs * factor, 2 if causal else 3, causal=causal, weight_norm=weight_norm)
        self.rate = Fraction(factor)

    def forward(self, x: Float[Tensor, "b c t"], state: State | None = None) -> Float[Tensor, "b c2 t2"]:
        return rearrange(super().forward(x, state), "b (c s) t -> b c (t s)", s=int(self.rate))


class Snake(nn.Module):
    """``x + sin²(αx) / α`` with an α per channel (Ziyin et al., arXiv 2006.08195): periodic, as sound is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b c t"]:
        # sin²(αx) / α is odd in α and tends to 0 with it, so that a small α may stand for 0.
        return x + (self.alpha * x).sin().square() / torch.where(self.alpha.abs() < 1e-6, 1e-6, self.alpha)


class StepNorm(nn.Module):
    """Layer norm over the channels of each step by itself: norms over time would see the future, and all of the past."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b c t"]:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class ResidualUnit(TimeLayer):
    """Snake, dilated convolution of kernel 7, snake, convolution of kernel 1 (as in DAC, arXiv 2306.06546)."""

    def __init__(self, channels: int, dilation: int, *, causal: bool) -> None:
        super().__init__()
        self.wide = TimeConv(channels, channels, 7, causal=causal, dilation=dilation, weight_norm=True)
        self.point = TimeConv(channels, channels, 1, causal=causal, weight_norm=True)
        self.snake1, self.snake2 = Snake(channels), Snake(channels)

    def forward(self, x: Float[Tensor, "b c t"], state: State | None = None) -> Float[Tensor, "b c t"]:
        return x + self.point(self.snake2(self.wide(self.snake1(x), state)))


class ConvNeXtBlock(TimeLayer):
    """Depthwise convolution, layer norm, and an MLP at each step (Liu et al., arXiv 2201.03545; over time as in Vocos, arXiv 2306.00814).

    Its output is scaled by a learned number per channel, small at the start, so that a deep stack starts near the identity.
    """

    def __init__(self, channels: int, kernel: int, *, scale: float, causal: bool) -> None:
        super().__init__()
        self.depthwise = TimeConv(channels, channels, kernel, causal=causal, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Float[Tensor, "b c t"], state: State | None = None) -> Float[Tensor, "b c t"]:
        y = self.norm(self.depthwise(x, state).transpose(1, 2))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).transpose(1, 2)


def reach(network: nn.Module, unit: int = 1) -> tuple[int, int]:
    """How far an output sees: inputs before and after those that it stands for, in whole ``unit`` inputs.

    Residual branches run beside the identity, so that every layer of a network counts, in the order in which it was made.
    """
    before = after = Fraction(0)
    rate = Fraction(1)
    for layer in network.modules():
        if isinstance(layer, TimeLayer):
            before += layer.padding[0] / rate
            after += layer.padding[1] / rate
            rate *= layer.rate
    return math.ceil(before / unit), math.ceil(after / unit)


def _length(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True)
