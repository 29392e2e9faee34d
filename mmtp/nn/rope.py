"""Rotary position embedding on three axes.

Every rotary frequency belongs to one axis (time, row, column), dealt out in turn as in Qwen3-VL's interleaved M-RoPE, so that
each axis has low and high frequencies. Where the three positions are equal (text, sound) this *is* plain RoPE
(Su et al. 2021, section 3.2.2), which keeps checkpoints exchangeable with Qwen3 and Llama.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Angles = tuple[Float[Tensor, "b s 1 hd"], Float[Tensor, "b s 1 hd"]]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Lower frequencies than those of the base, for contexts longer than the first one trained on (Llama 3.1; transformers: ``llama3``).

    Attributes:
        factor: by which frequencies are divided whose waves are long.
        low_freq_factor: waves are long from the original context divided by this on.
        high_freq_factor: waves are short, and stay, up to the original context divided by this; between the two, shares are mixed.
        original_max_position_embeddings: the original context, in positions.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequencies: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        waves = self.original_max_position_embeddings * frequencies / (2 * math.pi)  # how many fit into the original context
        kept = ((waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return torch.lerp(frequencies / self.factor, frequencies, kept)


class Rope(nn.Module):
    """Cosines and sines of all positions, computed once per pass and shared by all layers. Sines have the sign that their half needs.

    Args:
        head_dim: width of one head; even.
        theta: base of the frequencies.
        scaling: what becomes of them; None leaves them.
    """

    frequencies: Tensor
    axis: Tensor

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32)
        frequencies = theta ** (-steps / head_dim)
        self.register_buffer("frequencies", scaling(frequencies) if scaling else frequencies, persistent=False)
        self.register_buffer("axis", torch.arange(head_dim // 2) % 3, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Rope":
        # Frequencies stay float32 whatever weights become: far into a stream their rounding would be another position.
        kept = self.frequencies
        super()._apply(fn, recurse)
        if not kept.is_meta and self.frequencies.dtype != kept.dtype:
            self.frequencies = kept.to(self.frequencies.device)
        return self

    def forward(self, positions: Int[Tensor, "b s 3"]) -> Angles:
        angles = (positions[..., self.axis].float() * self.frequencies).unsqueeze(2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Float[Tensor, "b s h hd"], angles: Angles) -> Float[Tensor, "b s h hd"]:
    """Rotates the pairs ``(x[i], x[i + hd/2])``, as Llama and Qwen3 lay them out."""
    cos, sin = angles
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((high, low), dim=-1) * sin
