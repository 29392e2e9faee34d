"""How well a picture tokenizer gives pictures back, and how much of its codebooks it uses, over a whole set."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.eval.codes import CodeCounts, EvalError, batches
from mmtp.eval.features import FeatureDistances, FeatureNetwork, Seen
from mmtp.eval.report import Table
from mmtp.tokenizers.base import DiscreteTokenizer

WINDOW = 11
"""Pixels per side of the window of SSIM."""


class PictureDistances:
    """Means over the pictures of a set, reconstructions beside originals, gathered batch by batch.

    Reconstructions are rounded to 8 bits first, as they would be in a file.

    Args:
        network: in whose features perceptual and Fréchet distance are taken; None leaves them out.
    """

    def __init__(self, network: FeatureNetwork | None = None) -> None:
        self.network = network
        self.features = None if network is None else FeatureDistances()
        self._psnrs: list[float] = []
        self._ssims: list[float] = []

    def add(self, outputs: Sequence[Tensor], originals: Sequence[Tensor], seen: Seen | None = None) -> None:
        """Measures pictures ``[3, h, w]`` in [0, 1].

        Args:
            outputs: reconstructions.
            originals: of the same sizes.
            seen: what the network has seen in the originals; None lets it look again.
        """
        rounded = [output.cpu().float().clamp(0, 1).mul(255).round().div(255) for output in outputs]
        for output, original in zip(rounded, originals, strict=True):
            self._psnrs.append(psnr(output, original.cpu()))
            self._ssims.append(ssim(output, original.cpu()))
        if self.network is not None and self.features is not None:
            self.features.add(self.network.look(rounded), seen or self.network.look(originals))

    def __len__(self) -> int:
        return len(self._psnrs)

    def figures(self) -> dict[str, float | None]:
        """``psnr`` (dB), ``ssim`` and, with a network, ``perceptual`` and ``frechet`` (None of a single picture)."""
        found: dict[str, float | None] = {"psnr": sum(self._psnrs) / len(self), "ssim": sum(self._ssims) / len(self)}
        return found | ({"perceptual": self.features.perceptual, "frechet": self.features.frechet} if self.features else {})

    def remarks(self) -> dict[str, str]:
        """What is to be known of figures."""
        if self.features is None or self.network is None:
            return {}
        where = f"in features of {self.network.name}"
        return {"perceptual": where, "frechet": f"{where}; {self.features.remark}"}


@dataclass(frozen=True)
class PictureResult:
    """Figures of a tokenizer over a set.

    Attributes:
        pixels: of all pictures.
        codes: histograms of the codes.
        distances: means over pictures.
    """

    pixels: int
    codes: CodeCounts
    distances: PictureDistances

    @property
    def headline(self) -> float:
        """Mean PSNR in dB."""
        return self.to_dict()["psnr"]

    def tables(self, caption: str = "", extra: Sequence[tuple[str, str]] = ()) -> list[Table]:
        """The figures, and the codebooks one by one.

        Args:
            caption: of the figures.
            extra: more figures.
        """
        remarks, rows = self.distances.remarks(), []
        titles = {"perceptual": "perceptual distance", "frechet": "Fréchet distance"}
        for key, value in self._figures().items():
            shown = None if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            rows.append([titles.get(key, key.replace("_", " ")), shown, remarks.get(key, "")])
        return [Table(["figure", "value", ""], [*rows, *([*pair, ""] for pair in extra)], caption), self.codes.table()]

    def to_dict(self) -> dict[str, Any]:
        """``images``, ``tokens`` (over all codebooks), ``bits_per_pixel`` (of codes of equal length, over the whole set), the means of
        :meth:`PictureDistances.figures`, and those of the codebooks: ``codebook_usage`` (share of the entries that occur),
        ``perplexity`` and ``entropy_bits``, also one by one.
        """
        network = self.distances.network
        return (
            self._figures()
            | {"codebooks": self.codes.codebooks()}
            | ({"features": network.name, "remarks": self.distances.remarks()} if network else {})
        )

    def _figures(self) -> dict[str, Any]:
        counted = {"images": len(self.distances), "tokens": self.codes.tokens, "bits_per_pixel": self.codes.bits / self.pixels}
        return counted | self.distances.figures() | self.codes.figures()


def evaluate_tokenizer(
    tokenizer: DiscreteTokenizer, images: Iterable[Float[Tensor, "3 h w"]], network: FeatureNetwork | None = None
) -> PictureResult:
    """Encodes, decodes and compares every picture of a set.

    Args:
        tokenizer: a picture tokenizer with codes.
        images: pictures with values in [0, 1]; any sizes; read once, in batches.
        network: in whose features pictures are compared besides.

    Raises:
        EvalError: the set is empty.
    """
    counts, distances, pixels = CodeCounts(tokenizer.spec.codebook_sizes), PictureDistances(network), 0
    for batch in batches(images):
        codes = tokenizer.encode(batch)
        distances.add(tokenizer.decode(codes), batch)
        counts.add(codes)
        pixels += sum(image[0].numel() for image in batch)
    if not pixels:
        raise EvalError("the set holds no pictures to measure")
    return PictureResult(pixels, counts, distances)


def psnr(output: Float[Tensor, "c h w"], target: Float[Tensor, "c h w"]) -> float:
    """Peak signal-to-noise ratio in dB, values in [0, 1]; at most 100, which stands for equal."""
    error = float((output.double() - target.double()).square().mean())
    return min(100.0, -10 * math.log10(error)) if error > 0 else 100.0


def ssim(output: Float[Tensor, "c h w"], target: Float[Tensor, "c h w"]) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, per channel, interior only.

    Pictures with a side under 11 are measured in one window over the whole picture.
    """
    x, y = output.double(), target.double()
    planes = torch.stack([x, y, x * x, y * y, x * y])
    mean_x, mean_y, square_x, square_y, product = _blurred(planes) if min(x.shape[1:]) >= WINDOW else planes.mean((-2, -1))
    var_x, var_y, covariance = square_x - mean_x.square(), square_y - mean_y.square(), product - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))).mean())


def _blurred(planes: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h2 w2"]:
    """Means in the Gaussian window, along one axis after the other: torch's convolutions of doubles are many times slower."""
    offsets = torch.arange(WINDOW, dtype=torch.double) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * 1.5**2))
    weights = (weights / weights.sum()).tolist()
    for axis in (-1, -2):
        length = planes.shape[axis] - WINDOW + 1
        out = planes.narrow(axis, 0, length) * weights[0]
        for i, weight in enumerate(weights[1:], start=1):
            out.add_(planes.narrow(axis, i, length), alpha=weight)
        planes = out
    return planes
