"""Weights of the modalities that training learns by itself."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.types import Modality


class Uncertainty(nn.Module):
    """Homoscedastic uncertainty of every modality (Kendall et al. 2018, arXiv 1705.07115, eq. 10): ``sum_m w_m (e^{-s_m} L_m + s_m / 2)``.

    ``s_m`` is the logarithm of a learned variance. Where it is at its best, ``e^{-s_m} = 1 / (2 L_m)``: every modality's part is then
    of one size whatever its loss, and ``w_m`` is the share that it has. The model's part is trained with ``e^{-s_m}`` as a constant
    factor of ``w_m``, and the variances with ``L_m`` as constants, which are the two halves of the gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(len(Modality)))

    def factors(self) -> dict[Modality, float]:
        """``e^{-s_m}`` of every modality."""
        return dict(zip(Modality, (-self.log_variance.detach()).exp().tolist(), strict=True))

    def forward(self, losses: Mapping[Modality, float], weights: Mapping[str, float]) -> Float[Tensor, ""]:
        """The loss of the variances.

        Args:
            losses: ``L_m`` of the modalities of a batch.
            weights: ``w_m``; 1 where none is given.
        """
        parts: list[Tensor] = []
        for modality, loss in losses.items():
            s = self.log_variance[modality.index]
            parts.append(weights.get(modality, 1.0) * ((-s).exp() * loss + s / 2))
        return torch.stack(parts).sum()
