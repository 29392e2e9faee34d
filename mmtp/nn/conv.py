"""Convolutional blocks whose output at a pixel depends on its neighbourhood only, never on statistics of the whole picture."""

import math
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel (of each frame) by itself.

    Group norm would mix statistics of the whole plane into every pixel: a flat background would get other codes beside
    another foreground, and a padded picture other codes than the same picture before padding.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        # In channels_last memory this permutation is free.
        return F.layer_norm(x.movedim(1, -1), (x.shape[1],), self.weight, self.bias, 1e-6).movedim(-1, 1)


class Conv(nn.Conv2d):
    """A convolution that keeps the size: kernel 3 over the neighbourhood, or kernel 1 at each pixel by itself."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, padding_mode: Literal["zeros", "replicate"] = "zeros") -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, padding_mode=padding_mode)


class ResidualConv(nn.Module):
    """Pre-norm residual block of two convolutions (He et al. 2016, "Identity mappings", with SiLU).

    The second convolution starts at zero, so that a deep stack starts as the identity.
    """

    def __init__(self, channels: int, *, kernel: int = 3) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.conv1 = Conv(channels, channels, kernel=kernel)
        self.norm2 = ChannelNorm(channels)
        self.conv2 = Conv(channels, channels, kernel=kernel)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


def reach(network: nn.Module, unit: int = 1) -> int:
    """How far an output sees beyond the inputs that it stands for, on every side, in whole ``unit`` inputs.

    Residual branches run beside the identity, so that every layer of a network counts, in the order in which it was made.
    """
    seen, step = Fraction(0), Fraction(1)  # in inputs; the step is that of the layer's own grid
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            seen += step * Fraction(layer.kernel_size[0] - layer.stride[0], 2)
            step *= layer.stride[0]
        elif isinstance(layer, nn.PixelUnshuffle):
            step *= layer.downscale_factor
        elif isinstance(layer, nn.PixelShuffle):
            step /= layer.upscale_factor
    return math.ceil(seen / unit)
