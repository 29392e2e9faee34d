"""Rate and distortion of picture tokenizers beside the codecs of files: JPEG, WebP and AVIF, container included.

A tokenizer's rate is what its codes take, each as a number below its codebook's size, and four bytes for height and width. No
model predicts the codes: one that does would take fewer bytes (its cross-entropy).
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmtp.data.media import decode_image, to_uint8
from mmtp.eval.curves import Point, Progress, RateResult
from mmtp.eval.reconstruction import EvalError, psnr, ssim
from mmtp.tokenizers.base import DiscreteTokenizer

CODECS: dict[str, dict[str, Any]] = {
    "JPEG": {"format": "JPEG", "optimize": True},
    "WebP": {"format": "WEBP", "method": 6},
    "AVIF": {"format": "AVIF", "speed": 4},
}
"""Pillow's settings: each codec takes its time."""

QUALITIES = (0, 1, 2, 5, 10, 20, 35, 50, 65, 80, 90)
SIZE_BYTES = 4


@dataclass(frozen=True)
class RatePoint(Point):
    """Means over the pictures of a set; ``bytes`` are those of a picture.

    Attributes:
        psnr: dB.
        ssim: structural similarity.
    """

    COLUMNS: ClassVar = {"bytes": ("bytes", "{:.0f}"), "psnr": ("PSNR", "{:.2f} dB"), "ssim": ("SSIM", "{:.3f}")}
    AXES: ClassVar = {"bytes": "bytes per picture", "psnr": "PSNR in dB"}
    SETTING: ClassVar = "quality {}"

    psnr: float
    ssim: float


def compare_rates(
    tokenizer: DiscreteTokenizer,
    name: str,
    pictures: Sequence[Float[Tensor, "3 _ _"]],
    *,
    qualities: Sequence[int] = QUALITIES,
    progress: Progress | None = None,
) -> RateResult[RatePoint]:
    """Measures a tokenizer and every codec on the same pictures.

    Args:
        tokenizer: a picture tokenizer with codes.
        name: what the result calls it.
        pictures: with values in [0, 1].
        qualities: of the codecs, 0 to 100.
        progress: called with settings measured and settings in all.

    Raises:
        EvalError: there are no pictures.
    """
    if not pictures:
        raise EvalError("the set holds no pictures to measure")
    total = 1 + len(CODECS) * len(qualities)
    codes = tokenizer.encode(pictures)
    bits = [_code_bits(codes.item(i), tokenizer.spec.codebook_sizes) for i in range(len(pictures))]
    sizes = [math.ceil(b / 8) + SIZE_BYTES for b in bits]
    own = _point(name, "", pictures, tokenizer.decode(codes), sizes)
    points: list[RatePoint] = []
    for codec, settings in CODECS.items():
        for quality in qualities:
            if progress is not None:
                progress(1 + len(points), total)
            files = [encode_file(picture, quality, settings) for picture in pictures]
            points.append(_point(codec, str(quality), pictures, [decode_image(f) for f in files], [len(f) for f in files]))
    if progress is not None:
        progress(total, total)
    return RateResult(own, points)


def encode_file(picture: Float[Tensor, "3 h w"], quality: int, settings: dict[str, Any]) -> bytes:
    """A picture as a file."""
    out = io.BytesIO()
    Image.fromarray(to_uint8(picture)).save(out, quality=quality, **settings)
    return out.getvalue()


def _code_bits(ids: Tensor, codebook_sizes: Sequence[int]) -> float:
    return sum(codebook.numel() * math.log2(size) for codebook, size in zip(ids, codebook_sizes, strict=True))


def _point(name: str, setting: str, pictures: Sequence[Tensor], outputs: Sequence[Tensor], sizes: Sequence[int]) -> RatePoint:
    pairs = [(torch.from_numpy(to_uint8(o)).permute(2, 0, 1) / 255, p.cpu()) for o, p in zip(outputs, pictures, strict=True)]
    psnrs, ssims = [psnr(o, p) for o, p in pairs], [ssim(o, p) for o, p in pairs]
    return RatePoint(name, setting, *(sum(values) / len(pairs) for values in (sizes, psnrs, ssims)))
