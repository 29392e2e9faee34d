"""Rate and distortion of picture tokenizers beside the codecs of files: JPEG, WebP and AVIF, container included.

A tokenizer's rate is what its codes take, each as a number below its codebook's size, and four bytes for height and width. No
model predicts the codes: one that does would take fewer bytes (its cross-entropy).
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmtp.data.media import decode_image, to_uint8
from mmtp.eval.reconstruction import EvalError, psnr, ssim
from mmtp.eval.report import Figure, Table, lines
from mmtp.tokenizers.base import DiscreteTokenizer

CODECS: dict[str, dict[str, Any]] = {
    "JPEG": {"format": "JPEG", "optimize": True},
    "WebP": {"format": "WEBP", "method": 6},
    "AVIF": {"format": "AVIF", "speed": 4},
}
"""Pillow's settings: each codec takes its time."""

QUALITIES = (0, 1, 2, 5, 10, 20, 35, 50, 65, 80, 90)
SIZE_BYTES = 4

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@dataclass(frozen=True)
class RatePoint:
    """Means over the pictures of a set.

    Attributes:
        name: codec or tokenizer.
        setting: its quality.
        bytes: of a picture.
        psnr: dB.
        ssim: structural similarity.
    """

    name: str
    setting: str
    bytes: float
    psnr: float
    ssim: float


@dataclass(frozen=True)
class RateResult:
    """A tokenizer's point and the curves of the codecs."""

    tokenizer: RatePoint
    codecs: Sequence[RatePoint]

    def at(self, codec: str, budget: float) -> RatePoint | None:
        """What a codec reaches at so many bytes, linear between its settings in the logarithm of bytes.

        None where not even its lowest quality is as small.
        """
        curve = sorted((p for p in self.codecs if p.name == codec), key=lambda p: p.bytes)
        if not curve or budget < curve[0].bytes:
            return None
        if budget >= curve[-1].bytes:
            return curve[-1]
        right = next(i for i, p in enumerate(curve) if p.bytes > budget)
        low, high = curve[right - 1], curve[right]
        share = math.log(budget / low.bytes) / math.log(high.bytes / low.bytes)
        between = (a + share * (b - a) for a, b in ((low.psnr, high.psnr), (low.ssim, high.ssim)))
        return RatePoint(codec, f"{low.setting} to {high.setting}", budget, *between)

    def table(self, caption: str = "") -> Table:
        """The tokenizer, then every codec at equal bytes, at twice the bytes, and at its smallest."""
        rows = [self._row(self.tokenizer, "all of it")]
        for codec in dict.fromkeys(p.name for p in self.codecs):
            for times in (1, 2):
                point = self.at(codec, times * self.tokenizer.bytes)
                label = "equal bytes" if times == 1 else f"{times} × the bytes"
                rows.append(self._row(point, label) if point else [codec, label, None, None, None])
            smallest = min((p for p in self.codecs if p.name == codec), key=lambda p: p.bytes)
            rows.append(self._row(smallest, f"smallest (quality {smallest.setting})"))
        return Table(["", "at", "bytes", "PSNR", "SSIM"], rows, caption)

    def figure(self, caption: str = "") -> Figure:
        """PSNR over bytes."""
        series = {}
        for codec in dict.fromkeys(p.name for p in self.codecs):
            curve = sorted((p for p in self.codecs if p.name == codec), key=lambda p: p.bytes)
            series[codec] = ([p.bytes for p in curve], [p.psnr for p in curve])
        series[self.tokenizer.name] = ([self.tokenizer.bytes], [self.tokenizer.psnr])
        return lines(series, "bytes per picture", "PSNR in dB", caption, log_x=True)

    def to_dict(self) -> dict[str, Any]:
        return {"tokenizer": vars(self.tokenizer), "codecs": [vars(p) for p in self.codecs]}

    def _row(self, point: RatePoint, label: str) -> list[str | None]:
        return [point.name, label, f"{point.bytes:.0f}", f"{point.psnr:.2f} dB", f"{point.ssim:.3f}"]


def compare_rates(
    tokenizer: DiscreteTokenizer,
    name: str,
    pictures: Sequence[Float[Tensor, "3 _ _"]],
    *,
    qualities: Sequence[int] = QUALITIES,
    progress: Progress | None = None,
) -> RateResult:
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
