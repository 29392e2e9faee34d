"""The contest of a tokenizer with a discriminator: the losses of both sides."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.config import Config
from mmtp.train.losses.discriminators import Discriminator, Judgement
from mmtp.train.losses.terms import Term

LECAM_DECAY = 0.99
"""Of the running mean scores (LeCam's own code has the same)."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(Config):
    """How much a discriminator has to say, and how it learns.

    Attributes:
        weight: of the tokenizer's hinge loss.
        start: step from which both sides play. A discriminator tells the first, blurred reconstructions apart at a glance, and then
            only disturbs (VQGAN and LlamaGen wait for it).
        feature: weight of feature matching. EnCodec and DAC have it, picture tokenizers mostly a perceptual loss in its place.
        lecam: weight of LeCam regularisation (Tseng et al., arXiv 2104.03310, section 3) in the discriminator's loss: originals are
            held near the running mean score of reconstructions, and these near that of originals. It helps where data are few.
        adaptive: scale ``weight`` so that at the decoder's last layer the hinge loss pulls as strongly as the reconstruction (VQGAN,
            Esser et al., arXiv 2012.09841, eq. 7).
        lr: greatest learning rate of the discriminator; the schedule is the run's.
        betas: decay rates of its AdamW.
    """

    weight: float = 0.1
    start: int = 0
    feature: float = 0.0
    lecam: float = 0.0
    adaptive: bool = False
    lr: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)


class Adversary(nn.Module):
    """A discriminator and what it remembers.

    Args:
        config: weights.
        discriminator: of the medium.
    """

    real_scores: Tensor
    fake_scores: Tensor

    def __init__(self, config: AdversarialConfig, discriminator: Discriminator) -> None:
        super().__init__()
        self.config = config
        self.discriminator = discriminator
        self.register_buffer("real_scores", torch.zeros(discriminator.count))
        self.register_buffer("fake_scores", torch.zeros(discriminator.count))

    def fool(self, output: Float[Tensor, "b c *size"], target: Float[Tensor, "b c *size"]) -> dict[str, Term]:
        """The tokenizer's terms: ``adversarial``, and ``feature`` where it has a weight. The discriminator gets no gradient of them."""
        self.requires_grad_(False)
        fake = self.discriminator(output)
        terms = {"adversarial": Term(self.config.weight, generator_loss(fake))}
        if self.config.feature:
            with torch.no_grad():
                real = self.discriminator(target)
            terms["feature"] = Term(self.config.feature, feature_loss(real, fake))
        return terms

    def forward(self, output: Float[Tensor, "b c *size"], target: Float[Tensor, "b c *size"]) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The discriminator's loss, and for the log its hinge part (``critic``; 2 is a coin toss) and both mean scores.

        Args:
            output: reconstruction, detached.
            target: original.
        """
        self.requires_grad_(True)
        real, fake = self.discriminator(target), self.discriminator(output)
        loss = hinge = discriminator_loss(real, fake)
        real_means, fake_means = (torch.stack([j.scores.detach().float().mean() for j in side]) for side in (real, fake))
        if self.config.lecam:
            loss = loss + self.config.lecam * lecam_loss(real, fake, self.real_scores, self.fake_scores)
            self.real_scores.lerp_(real_means, 1 - LECAM_DECAY)
            self.fake_scores.lerp_(fake_means, 1 - LECAM_DECAY)
        return loss, {"critic": hinge.item(), "critic.real": real_means.mean().item(), "critic.fake": fake_means.mean().item()}


def adaptive_weight(reconstruction: Float[Tensor, ""], adversarial: Float[Tensor, ""], last_layer: nn.Parameter) -> float:
    """How many times the adversarial loss must be taken to pull as strongly as the reconstruction (VQGAN, arXiv 2012.09841, eq. 7).

    It is the ratio of the norms of their gradients at the weight of the decoder's last layer, at most 10^4.
    """
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4).item()


def lecam_loss(
    real: Sequence[Judgement], fake: Sequence[Judgement], real_scores: Float[Tensor, " r"], fake_scores: Float[Tensor, " r"]
) -> Float[Tensor, ""]:
    """Squared distance of originals' scores to the running mean of reconstructions', and the reverse; mean over resolutions."""
    pairs = zip(real, fake, real_scores, fake_scores, strict=True)
    return _mean((r.scores.float() - b).square().mean() + (f.scores.float() - a).square().mean() for r, f, a, b in pairs)


def discriminator_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Float[Tensor, ""]:
    """Hinge loss of the discriminator, mean over resolutions: originals above 1, reconstructions (given detached) below -1."""
    return _mean(F.relu(1 - r.scores.float()).mean() + F.relu(1 + f.scores.float()).mean() for r, f in zip(real, fake, strict=True))


def generator_loss(fake: Sequence[Judgement]) -> Float[Tensor, ""]:
    """Hinge loss of the tokenizer, mean over resolutions: reconstructions above 1."""
    return _mean(F.relu(1 - f.scores.float()).mean() for f in fake)


def feature_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Float[Tensor, ""]:
    """Feature matching: mean absolute difference of every layer's features, relative to the original's (EnCodec, section 3.4)."""
    terms = []
    for r, f in zip(real, fake, strict=True):
        for a, b in zip(r.features, f.features, strict=True):
            a, b = a.detach().float(), b.float()
            terms.append((a - b).abs().mean() / a.abs().mean().clamp_min(1e-8))
    return _mean(terms)


def _mean(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()
