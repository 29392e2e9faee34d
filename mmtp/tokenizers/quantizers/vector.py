"""Quantizers with a learned codebook: VQ, SimVQ, and index back-propagation."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import SimVQ as _SimVQ
from vector_quantize_pytorch import VectorQuantize as _VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from mmtp.tokenizers.quantizers.base import LibraryQuantizer, QuantizerConfig

Q = TypeVar("Q", bound=nn.Module)


class VQ(LibraryQuantizer):
    """Vector quantization with a codebook kept by exponential moving average (van den Oord et al., arXiv 1711.00937, appendix A.1).

    The defaults are those that do not collapse: cosine distance in 8 dimensions (ViT-VQGAN, arXiv 2110.04627, section 3.2), k-means
    start, decay 0.99, unused entries replaced (with the library's defaults 109 of 1024 entries were in use after 400 steps, with
    these all 1024).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``codebook_size`` entries of ``codebook_dim`` numbers.

        Attributes:
            codebook_size: entries.
            codebook_dim: numbers of an entry; latents are projected to them and back.
            cosine: whether directions are compared, and entries are unit vectors.
            decay: of the moving average.
            dead_code_share: entries that are used less often (moving average) than this share of an even use are replaced by latents of
                the batch; 0 replaces none.
            commitment: weight of the loss that draws latents to their entries.
            rotation_trick: pass gradients through the rotation from latent to entry (Fifty et al., arXiv 2410.06424), in place of
                straight through.
        """

        codebook_size: int = 4096
        codebook_dim: int = 8
        cosine: bool = True
        decay: float = 0.99
        dead_code_share: float = 0.2
        commitment: float = 0.25
        rotation_trick: bool = True

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.vq = start_in_training(
            _VectorQuantize(
                dim=dim,
                codebook_size=config.codebook_size,
                codebook_dim=config.codebook_dim,
                use_cosine_sim=config.cosine,
                kmeans_init=True,
                decay=config.decay,
                threshold_ema_dead_code=int(config.dead_code_share > 0),
                commitment_weight=config.commitment,
                rotation_trick=config.rotation_trick,
            )
        )
        self.codebook_sizes = (config.codebook_size,)

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        replace_dead_codes(self.vq, self.config.dead_code_share, latents[..., 0].numel())
        out, ids, loss = self.vq(latents)
        return out, ids[..., None], loss.reshape(())

    def _lookup(self, ids: Tensor) -> Tensor:
        return self.vq.get_output_from_indices(ids[..., 0])


class SimVQ(LibraryQuantizer):
    """One linear layer over a frozen random codebook (Zhu et al., arXiv 2411.02038, section 4): every step moves all entries, none dies."""

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``codebook_size`` entries, ``commitment`` of latents to them, ``rotation_trick`` as for VQ."""

        codebook_size: int = 4096
        commitment: float = 0.25
        rotation_trick: bool = True

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.vq = _SimVQ(
            dim=dim,
            codebook_size=config.codebook_size,
            rotation_trick=config.rotation_trick,
            input_to_quantize_commit_loss_weight=config.commitment,
        )
        self.codebook_sizes = (config.codebook_size,)

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, ids, loss = self.vq(latents)
        # The rotation gives the entry up to rounding; what is decoded is the entry itself.
        return out if self.training else self._lookup(ids[..., None]), ids[..., None], loss

    def _lookup(self, ids: Tensor) -> Tensor:
        return self.vq.indices_to_codes(ids[..., 0])


class IBQ(LibraryQuantizer):
    """Index back-propagation (Shi et al., arXiv 2412.02692, section 3.2): the straight-through estimate is taken of the one-hot index.

    So the gradient reaches all entries of the codebook in every step, in the measure of their probability, and none dies. The library
    has no such class; this one is its equations: probabilities of a softmax over the products of latent and entries, the double
    quantization loss, and an entropy loss.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``codebook_size`` entries of ``codebook_dim`` numbers.

        Attributes:
            codebook_size: entries.
            codebook_dim: numbers of an entry. Below 32 use collapses (SEED-Voken issue 59).
            commitment: weight of the loss that draws latents to their entries.
            entropy: weight of the entropy loss: sure of each latent, even over all.
            temperature: of the softmax in the entropy loss.
        """

        codebook_size: int = 4096
        codebook_dim: int = 32
        commitment: float = 0.25
        entropy: float = 0.05
        temperature: float = 0.01

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.project_in = nn.Linear(dim, config.codebook_dim)
        self.project_out = nn.Linear(config.codebook_dim, dim)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.codebook_dim) / config.codebook_dim**0.5)
        self.codebook_sizes = (config.codebook_size,)

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.project_in(latents)
        logits = z @ self.codebook.T
        ids = logits.argmax(-1)
        entries = F.embedding(ids, self.codebook)
        if not self.training:
            return self.project_out(entries), ids[..., None], z.new_zeros(())
        soft = logits.softmax(-1)
        one_hot = F.one_hot(ids, self.config.codebook_size).to(soft)
        chosen = (one_hot - soft.detach() + soft) @ self.codebook
        loss = F.mse_loss(chosen, z) + F.mse_loss(entries.detach(), z) + self.config.commitment * F.mse_loss(entries, z.detach())
        loss = loss + self.config.entropy * entropy_loss((logits / self.config.temperature).flatten(0, 1))
        return self.project_out(chosen), ids[..., None], loss

    def _lookup(self, ids: Tensor) -> Tensor:
        return self.project_out(F.embedding(ids[..., 0], self.codebook))


def entropy_loss(logits: Tensor) -> Tensor:
    """Mean entropy of each row's distribution less the entropy of their mean (MAGVIT-v2, arXiv 2310.05737, eq. 5)."""
    log = logits.log_softmax(-1)
    each = -(log.exp() * log).sum(-1).mean()
    mean = log.exp().mean(0)
    return each + (mean * mean.clamp(min=1e-9).log()).sum()


def replace_dead_codes(vq: Any, share: float, latents: int) -> None:
    """Tells a codebook which entries are dead at this size of batch: those used less often than a share of an even use.

    The library counts uses per batch. A threshold of 1 there, with fewer latents in a batch than entries, calls most entries dead at every
    step, and codes never settle (WavTokenizer's issue 82 is of this kind). A new entry starts at an even use, and has time to prove itself.
    """
    even = latents / vq.codebook_size
    codebook_of(vq).threshold_ema_dead_code, codebook_of(vq).reset_cluster_size = share * even, even


def codebook_of(vq: Any) -> Any:
    """The library's codebook, which keeps counts and averages."""
    return vq._codebook


class _TrainedCodebook(Codebook):
    """A codebook that only training starts."""

    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        if self.training:
            super().init_embed_(data, mask)


def start_in_training(quantizer: Q) -> Q:
    """Keeps codebooks from starting (k-means) in evaluation mode, as the library's do when training has not reached them.

    What they encode would depend on what was encoded first, and encoding would change the weights. So a codebook waits with all entries
    0: every latent has code 0, which adds nothing. Late residual codebooks that quantizer dropout has left out so far add nothing either.
    """
    for module in quantizer.modules():
        if type(module) is Codebook:
            # The library names the class itself; one method is all that differs.
            module.__class__ = _TrainedCodebook
    return quantizer
