"""Rate and distortion of picture tokenizers beside the codecs of files: JPEG, WebP and AVIF, container included.

A tokenizer's rate is what its codes take, each as a number below its codebook's size, and four bytes for height and width. No
model predicts the codes: one that does would take fewer bytes (its cross-entropy).
"""

import io
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, ClassVar

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmtp.data.media import decode_image, to_uint8
from mmtp.eval.codes import EvalError
from mmtp.eval.curves import Point, Progress, RateResult, few_codebooks, first_codebooks
from mmtp.eval.features import FeatureNetwork
from mmtp.eval.reconstruction import PictureDistances
from mmtp.tokenizers.base import DiscreteTokenizer

CODECS: dict[str, dict[str, Any]] = {
    "JPEG": {"format": "JPEG", "optimize": True},
    "WebP": {"format": "WEBP", "method": 6},
    "AVIF": {"format": "AVIF", "speed": 4},
}
"""Pillow's settings: each codec takes its time."""

QUALITIES = (0, 1, 2, 5, 10, 20, 35, 50, 65, 80, 90)
SIZE_BYTES = 4

CHUNK = 32
"""Pictures that are measured at a time; of a network's features a picture's are a few megabytes."""


@dataclass(frozen=True)
class RatePoint(Point):
    """Means over the pictures of a set; ``bytes`` are those of a picture.

    Attributes:
        psnr: dB.
        ssim: structural similarity.
        perceptual: perceptual distance; None where no network looks.
        frechet: Fréchet distance of the whole set; likewise.
    """

    COLUMNS: ClassVar = {
        "bytes": ("bytes", "{:.0f}"),
        "psnr": ("PSNR", "{:.2f} dB"),
        "ssim": ("SSIM", "{:.3f}"),
        "perceptual": ("perceptual distance", "{:.4f}"),
        "frechet": ("Fréchet distance", "{:.3f}"),
    }
    AXES: ClassVar = {
        "bytes": "bytes per picture",
        "psnr": "PSNR in dB",
        "ssim": "SSIM",
        "perceptual": "perceptual distance",
        "frechet": "Fréchet distance",
    }
    SETTING: ClassVar = "quality {}"

    psnr: float
    ssim: float
    perceptual: float | None = None
    frechet: float | None = None


def compare_rates(
    tokenizer: DiscreteTokenizer,
    name: str,
    pictures: Sequence[Float[Tensor, "3 _ _"]],
    *,
    network: FeatureNetwork | None = None,
    qualities: Sequence[int] = QUALITIES,
    curves: bool = True,
    progress: Progress | None = None,
) -> RateResult[RatePoint]:
    """Measures a tokenizer and every codec on the same pictures.

    Args:
        tokenizer: a picture tokenizer with codes.
        name: what the result calls it.
        pictures: with values in [0, 1].
        network: in whose features pictures are compared besides.
        qualities: of the codecs, 0 to 100, from the least.
        curves: whether every quality is measured, as plots want; else each codec goes no further than twice the tokenizer's bytes, which
            the table needs: it comes out the same.
        progress: called with steps done and steps in all.

    Raises:
        EvalError: there are no pictures.
    """
    if not pictures:
        raise EvalError("the set holds no pictures to measure")
    sizes, few = tokenizer.spec.codebook_sizes, few_codebooks(tokenizer.spec)
    chunks = [range(first, min(first + CHUNK, len(pictures))) for first in range(0, len(pictures), CHUNK)]
    encodings = len(CODECS) * len(qualities)

    def step(done: int) -> None:
        if progress is not None:
            progress(done, encodings + len(chunks))

    coded = [tokenizer.encode([pictures[i] for i in chunk]) for chunk in chunks]
    own = {k: _Setting(name, first_codebooks(k), network) for k in few} | {len(sizes): _Setting(name, "", network)}
    for k, setting in own.items():
        items = [codes.item(i)[:k] for codes in coded for i in range(len(codes))]
        setting.sizes = [math.ceil(_code_bits(ids, sizes[:k]) / 8) + SIZE_BYTES for ids in items]
    enough = math.inf if curves else 2 * own[len(sizes)].bytes
    files: list[_Setting] = []
    for i, codec in enumerate(CODECS):
        for done, setting in enumerate(_compressed(codec, pictures, network, qualities, enough), start=1):
            files.append(setting)
            step(i * len(qualities) + done)
    for i, (chunk, codes) in enumerate(zip(chunks, coded, strict=True), start=1):
        originals = [pictures[i] for i in chunk]
        seen = network.look(originals) if network else None
        for k, setting in own.items():
            setting.distances.add(tokenizer.decode(replace(codes, ids=codes.ids[:, :k])), originals, seen)
        for setting in files:
            setting.distances.add([decode_image(setting.files[i]) for i in chunk], originals, seen)
        step(encodings + i)
    *fewer, point = [setting.point() for setting in own.values()]
    remarks = own[len(sizes)].distances.remarks()
    return RateResult(point, [s.point() for s in files], [f"{RatePoint.COLUMNS[key][0]}: {text}" for key, text in remarks.items()], fewer)


class _Setting:
    """What a tokenizer or codec makes of a set at one setting, as it comes together."""

    def __init__(self, name: str, setting: str, network: FeatureNetwork | None) -> None:
        self.name, self.setting = name, setting
        self.sizes: list[int] = []
        self.files: list[bytes] = []
        self.distances = PictureDistances(network)

    @property
    def bytes(self) -> float:
        return sum(self.sizes) / len(self.sizes)

    def point(self) -> RatePoint:
        return RatePoint(self.name, self.setting, self.bytes, **self.distances.figures())  # pyrefly: ignore


def _compressed(
    codec: str, pictures: Sequence[Tensor], network: FeatureNetwork | None, qualities: Sequence[int], enough: float
) -> Iterator[_Setting]:
    """All pictures through a codec's encoder, quality by quality, up to the first that takes more than ``enough`` bytes."""
    with ThreadPoolExecutor() as pool:  # encoders let go of the interpreter while they work
        for quality in qualities:
            setting = _Setting(codec, str(quality), network)
            setting.files = list(pool.map(encode_file, pictures, repeat(quality), repeat(CODECS[codec])))
            setting.sizes = [len(file) for file in setting.files]
            yield setting
            if setting.bytes > enough:
                return


def encode_file(picture: Float[Tensor, "3 h w"], quality: int, settings: dict[str, Any]) -> bytes:
    """A picture as a file."""
    out = io.BytesIO()
    Image.fromarray(to_uint8(picture)).save(out, quality=quality, **settings)
    return out.getvalue()


def _code_bits(ids: Tensor, codebook_sizes: Sequence[int]) -> float:
    return sum(codebook.numel() * math.log2(size) for codebook, size in zip(ids, codebook_sizes, strict=True))
