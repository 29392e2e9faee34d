"""A picture as the sum of a pyramid of square grids, coarse to fine (VAR, Tian et al., arXiv 2404.02905, algorithms 1 and 2)."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

SMOOTHED = 0.5
"""Share of the convolution in what a scale adds (VAR's ``quant_resi``)."""


def scale_ends(scales: Sequence[int]) -> tuple[int, ...]:
    """Where each scale ends in a row of all cells, scale by scale."""
    return tuple(accumulate(side * side for side in scales))


def enlarged(
    cells: Float[Tensor, "b n d"], i: int, scales: Sequence[int], smooth: nn.ModuleList | Sequence[Callable[[Tensor], Tensor]]
) -> Float[Tensor, "b d h w"]:
    """What the cells of a scale add to the picture.

    Args:
        cells: row by row.
        i: which scale.
        scales: cells per side of every grid; the last is that of the picture.
        smooth: convolutions, of which neighbouring scales share one where they are fewer than the scales.
    """
    plane = rearrange(cells, "b (h w) d -> b d h w", h=scales[i])
    if scales[i] < scales[-1]:
        plane = F.interpolate(plane, size=(scales[-1],) * 2, mode="bicubic")
    return plane.lerp(smooth[i * len(smooth) // len(scales)](plane), SMOOTHED)


def averaged(plane: Float[Tensor, "b d h w"], side: int) -> Float[Tensor, "b n d"]:
    """Means over the cells of a grid."""
    return rearrange(F.adaptive_avg_pool2d(plane, side), "b d h w -> b (h w) d")
