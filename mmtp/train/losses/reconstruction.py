"""How far a picture is from its original."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mmtp.config import Config
from mmtp.train.losses.perceptual import PerceptualLoss
from mmtp.train.losses.terms import ReconstructionLoss, Term


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(Config):
    """Weights of the terms of a picture tokenizer's loss.

    Attributes:
        l1: of the absolute error, which keeps flat areas flat.
        l2: of the squared error, which PSNR measures.
        quantizer: of the quantizer's own loss.
    """

    l1: float = 0.5
    l2: float = 1.0
    quantizer: float = 1.0


class PictureReconstructionLoss(ReconstructionLoss):
    """Absolute and squared error of pixels, and if wanted how different both look to a trained network.

    Args:
        config: weights of the errors of pixels.
        perceptual: the network and its weight.
    """

    def __init__(self, config: ReconstructionConfig, perceptual: PerceptualLoss | None = None) -> None:
        super().__init__()
        self.config, self.perceptual = config, perceptual

    def terms(self, output: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> tuple[dict[str, Term], dict[str, float]]:
        """The terms; for the log ``l1``, ``psnr`` (dB over the batch, peak to peak 2) and ``perceptual``."""
        difference = output.float() - target.float()
        l1, l2 = difference.abs().mean(), difference.square().mean()
        psnr = -10 * (l2.detach() / 4).clamp_min(1e-12).log10()
        terms = {"l1": Term(self.config.l1, l1), "l2": Term(self.config.l2, l2)}
        metrics = {"l1": l1.item(), "psnr": psnr.item()}
        if self.perceptual:
            terms["perceptual"] = Term(self.perceptual.config.weight, self.perceptual(output, target))
            metrics["perceptual"] = terms["perceptual"].value.item()
        return terms, metrics
