"""How well a picture tokenizer gives pictures back, and how much of its codebooks it uses, over a whole set."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmtp.eval.codes import CodeCounts
from mmtp.tokenizers.base import DiscreteTokenizer
from mmtp.types import MmtpError

BATCH = 64


class EvalError(MmtpError):
    """A measurement that cannot be made."""


def evaluate_tokenizer(tokenizer: DiscreteTokenizer, images: Iterable[Float[Tensor, "3 h w"]]) -> dict[str, float]:
    """Encodes, decodes and compares every picture of a set.

    Output is rounded to 8 bits first, as it would be in a file. Figures are means of per-picture values, as is usual, except usage
    and perplexity, which belong to the whole set.

    Args:
        tokenizer: a picture tokenizer with codes.
        images: pictures with values in [0, 1]; any sizes; read once, in batches.

    Returns:
        ``images``, ``tokens`` (over all codebooks), ``bits_per_pixel`` (of codes of equal length, over the whole set), ``psnr`` (dB),
        ``ssim``, ``codebook_usage`` (share of the entries that occur) and ``perplexity`` (2 to the entropy of the codes), the last two
        as means over codebooks.

    Raises:
        EvalError: the set is empty.
    """
    psnrs: list[float] = []
    ssims: list[float] = []
    pixels = 0
    counts = CodeCounts(tokenizer.spec.codebook_sizes)
    for batch in _batches(images):
        codes = tokenizer.encode(batch)
        for image, output in zip(batch, tokenizer.decode(codes), strict=True):
            rounded = output.cpu().mul(255).round().div(255)
            psnrs.append(psnr(rounded, image.cpu()))
            ssims.append(ssim(rounded, image.cpu()))
            pixels += image[0].numel()
        counts.add(codes)
    if not psnrs:
        raise EvalError("the set holds no pictures to measure")
    return {
        "images": float(len(psnrs)),
        "tokens": float(counts.tokens),
        "bits_per_pixel": counts.bits / pixels,
        "psnr": sum(psnrs) / len(psnrs),
        "ssim": sum(ssims) / len(ssims),
        "codebook_usage": sum(counts.usages) / len(counts.usages),
        "perplexity": sum(counts.perplexities) / len(counts.perplexities),
    }


def psnr(output: Float[Tensor, "c h w"], target: Float[Tensor, "c h w"]) -> float:
    """Peak signal-to-noise ratio in dB, values in [0, 1]; at most 100, which stands for equal."""
    error = float((output.double() - target.double()).square().mean())
    return min(100.0, -10 * math.log10(error)) if error > 0 else 100.0


def ssim(output: Float[Tensor, "c h w"], target: Float[Tensor, "c h w"]) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, per channel, interior only.

    Pictures with a side under 11 are measured in one window over the whole picture.
    """
    x, y = output.double()[:, None], target.double()[:, None]
    window = _window() if min(x.shape[-2:]) >= 11 else torch.full((1, 1, *x.shape[-2:]), 1 / x[0].numel(), dtype=torch.double)
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    var_x = F.conv2d(x * x, window) - mean_x.square()
    var_y = F.conv2d(y * y, window) - mean_y.square()
    covariance = F.conv2d(x * y, window) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))).mean())


def _window() -> Float[Tensor, "1 1 11 11"]:
    offsets = torch.arange(11, dtype=torch.double) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    line = line / line.sum()
    return (line[:, None] * line[None, :])[None, None]


def _batches(images: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    iterator = iter(images)
    while batch := list(islice(iterator, BATCH)):
        yield batch
