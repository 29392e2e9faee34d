"""How far reconstructions are from their originals in the features of a named network: picture by picture, and as whole sets.

Neither figure is LPIPS or FID: those belong to networks of their own. Only numbers of one network compare, and a tokenizer that was trained
to please a network should be judged by another.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.eval.codes import EvalError, batches
from mmtp.nn.features import LAYERS, Stages, check_network, load_stages, perceptual_distances, resized
from mmtp.types import MmtpError

PASS = 16
"""Pictures that pass the network at a time."""


class Seen(NamedTuple):
    """What a network sees in pictures.

    Attributes:
        stages: features of its first four stages, each ``[b, c, h, w]``.
        pooled: those of its last stage as means over positions.
    """

    stages: list[Tensor]
    pooled: Float[Tensor, "b d"]


class FeatureNetwork:
    """A network that looks at pictures of any size, each brought to 224×224 before.

    Args:
        name: what figures call it.
        stages: the network, frozen and in evaluation mode.
    """

    def __init__(self, name: str, stages: Stages) -> None:
        self.name = name
        self._stages = stages

    @classmethod
    def load(cls, name: str) -> "FeatureNetwork":
        """A network by name.

        Args:
            name: ``efficientnet-lite0`` or ``-lite2``, or ``timm:NAME`` for any convolutional model of timm, with the weights of
                the Hub or, as ``timm:NAME:FILE``, those of a local file.

        Raises:
            EvalError: there is no such network, it is not installed, or its weights cannot be read.
        """
        kind, _, rest = name.partition(":")
        model, _, weights = rest.partition(":")
        network = f"{kind}:{model}" if rest else name
        try:
            check_network(network, bool(weights))
            return cls(network, load_stages(network, Path(weights) if weights else None))
        except MmtpError as error:
            raise EvalError(f"--features: {error}") from error
        except ValueError as error:
            raise EvalError(f"--features: {error}[:FILE OF WEIGHTS]") from error

    @torch.inference_mode()
    def look(self, pictures: Sequence[Float[Tensor, "3 _ _"]]) -> Seen:
        """What it sees in pictures with values in [0, 1]."""
        found: list[Sequence[Tensor]] = []
        for some in batches(pictures, PASS):
            found.append(self._stages(torch.cat([resized(p[None].cpu().float()) for p in some]) * 2 - 1))
        stages = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return Seen(stages[: len(LAYERS)], stages[-1].float().mean((2, 3)))

    def pooled(self, pictures: Sequence[Float[Tensor, "3 _ _"]]) -> Float[Tensor, "b c"]:
        """The pooled features alone, of any number of pictures: the stages of ten thousand would not fit in memory."""
        return torch.cat([self.look(some).pooled for some in batches(pictures, PASS)])


class Gaussian:
    """Mean and covariance of the vectors of a set, in float64, gathered batch by batch.

    Attributes:
        count: vectors so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor = torch.zeros((), dtype=torch.double)
        self._products: Tensor = torch.zeros((), dtype=torch.double)

    def add(self, vectors: Float[Tensor, "b d"]) -> None:
        """Counts vectors in."""
        vectors = vectors.double()
        self.count += len(vectors)
        self._sum = self._sum + vectors.sum(0)
        self._products = self._products + vectors.T @ vectors

    @property
    def mean(self) -> Float[Tensor, " d"]:
        return self._sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased one; wants two vectors."""
        return (self._products - self.count * self.mean.outer(self.mean)) / (self.count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two normal distributions (Dowson and Landau 1982; Heusel et al., arXiv 1706.08500).

    ``|m - n|² + tr(A + B - 2 (A B)^½)``. With ``A = F Fᵀ`` and ``B = G Gᵀ`` from eigenvalues, the trace of ``(A B)^½`` is the sum of the
    singular values of ``Fᵀ G``, which needs no root of a matrix that is not symmetric and takes singular covariances.
    """
    cross = torch.linalg.matrix_norm(_factor(a.covariance).T @ _factor(b.covariance), "nuc")
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


class FeatureDistances:
    """Both distances over a set, gathered batch by batch."""

    def __init__(self) -> None:
        self._perceptual = 0.0
        self._outputs, self._originals = Gaussian(), Gaussian()

    def add(self, output: Seen, original: Seen) -> None:
        """Takes in what was seen in reconstructions and in their originals."""
        self._perceptual += float(perceptual_distances(output.stages, original.stages).double().sum())
        self._outputs.add(output.pooled)
        self._originals.add(original.pooled)

    @property
    def perceptual(self) -> float:
        """Mean of :func:`~mmtp.nn.features.perceptual_distances` over pictures, 0..4."""
        return self._perceptual / self._outputs.count

    @property
    def frechet(self) -> float | None:
        """:func:`frechet_distance` of the pooled features; None of a single picture."""
        return frechet_distance(self._outputs, self._originals) if self._outputs.count > 1 else None

    @property
    def remark(self) -> str:
        """What is to be known of the Fréchet distance of so many pictures."""
        n, d = self._outputs.count, len(self._outputs.mean)
        if n < 2:
            return "one picture has no covariance"
        if n <= d:
            return f"{n} pictures for {d} dimensions: covariances are singular; compare only with figures of these very pictures"
        return f"{n} pictures, {d} dimensions; compare only at equal number, as few pictures bias it"


def _factor(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """``F`` with ``F Fᵀ = covariance``."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()
