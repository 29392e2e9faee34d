"""How far a reconstruction is from its original."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mmtp.config import Config


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(Config):
    """Weights of the terms of a tokenizer's loss."""

    l1: float = 0.5
    l2: float = 1.0
    quantizer: float = 1.0


def reconstruction_loss(
    output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], config: ReconstructionConfig
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Weighted sum of absolute and squared error (L1 keeps flat areas flat, L2 is what PSNR measures).

    Args:
        output: reconstruction, values in [-1, 1].
        target: original.
        config: weights.

    Returns:
        The loss, and ``l1`` and ``psnr`` (dB over the batch, peak to peak 2) for the log.
    """
    difference = output.float() - target.float()
    l1 = difference.abs().mean()
    l2 = difference.square().mean()
    psnr = -10 * (l2.detach() / 4).clamp_min(1e-12).log10()
    return config.l1 * l1 + config.l2 * l2, {"l1": l1.item(), "psnr": psnr.item()}
