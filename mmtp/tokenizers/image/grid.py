"""What all picture tokenizers share: pictures of any size to a grid of codes and back, at bounded memory. Subclasses bring the networks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.config import Config
from mmtp.tokenizers.image.tiling import Tiling, Window
from mmtp.tokenizers.quantizers import Quantized, QuantizerConfig
from mmtp.tokenizers.reference import FingerprintCache, Reference
from mmtp.types import Codes, MmtpError, Modality, TokenizerSpec

PIXELS_PER_PASS = 2**20
"""Pictures pass the networks in groups of about this many pixels, so that memory does not grow with the length of a list."""


class ImageShapeError(MmtpError):
    """A picture that is not ``[3, height, width]`` floats, or not of a size that the tokenizer takes."""


class ImageValueError(MmtpError):
    """A picture with a value that is not a number, or infinite."""


class ImageCodesError(MmtpError):
    """Codes that are not this tokenizer's."""


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Config):
    """What the configurations of all picture tokenizers have.

    Attributes:
        quantizer: any registered quantizer's configuration.
    """

    quantizer: QuantizerConfig


class ImageTokenizer(nn.Module):
    """Encoder, quantizer and decoder between pictures ``[3, h, w]`` in [0, 1] and codes ``[k, rows, columns]``.

    Pictures are padded by repeating their border to whole cells and cropped again by ``decode``; nothing is ever resized. What is larger
    than ``tiling`` says passes the networks in overlapping tiles: their latents are joined before they are quantized.

    Attributes:
        alone: whether every picture passes the networks by itself. A kernel may add in another order where a batch is larger, and where
            everything in a picture sees everything else, that may change a code; so codes cannot depend on the batch.
    """

    alone: ClassVar[bool] = True

    def __init__(self, config: ImageConfig, encoder: nn.Module, decoder: nn.Module, *, dim: int, cell: tuple[int, int]) -> None:
        """Of networks ``[b, 3, h, w] -> [b, dim, rows, columns]`` and back; a cell of the grid has (height, width) ``cell`` pixels."""
        super().__init__()
        self.config: Any = config
        self.dim, self.cell = dim, cell
        self.encoder = encoder
        self.quantizer = config.quantizer.build(dim=dim)
        self.decoder = decoder
        self._fingerprint = FingerprintCache()

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(
            modality=Modality.IMAGE,
            codebook_sizes=self.quantizer.codebook_sizes,
            downsampling=self.cell,
            channels=3,
            fingerprint=self._fingerprint.of(self.config, self),
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def tiling(self) -> Tiling | None:
        """How large pictures are cut; None where no picture is."""
        return None

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        height, width = shape
        return -(-height // self.cell[0]), -(-width // self.cell[1])

    def extent(self, grid: Sequence[int]) -> tuple[int, int]:
        """Height and width of the picture of whole cells that has this grid."""
        rows, columns = grid
        return rows * self.cell[0], columns * self.cell[1]

    def num_tokens(self, shape: Sequence[int]) -> int:
        rows, columns = self.grid(shape)
        return rows * columns * len(self.quantizer.codebook_sizes)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b 3 h w"], Quantized]:
        """Reconstruction of pixels in [-1, 1] of whole cells: what training calls."""
        size = pixels.shape[2], pixels.shape[3]
        if (whole := self.extent(self.grid(size))) != size:
            raise ImageShapeError(f"pictures of {size[0]}x{size[1]} pixels given, whole cells are wanted: {whole[0]}x{whole[1]}")
        latents = self.encoder(pixels)
        quantized = self.quantizer(rearrange(latents, "b d h w -> b (h w) d"))
        return self.decoder(rearrange(quantized.latents, "b (h w) d -> b d h w", h=latents.shape[2])).float(), quantized

    def encode(self, media: Sequence[Tensor]) -> Codes:
        """Codes of pictures ``[3, h, w]`` with values in [0, 1], in evaluation mode and float32 whatever mode the module is in.

        Pictures are grouped by padded size, so that none is padded for the sake of another.

        Raises:
            ImageShapeError: a picture is not ``[3, height, width]`` of floats, empty, or of a size that this tokenizer does not take.
            ImageValueError: a value is not finite.
        """
        sizes = [picture_size(picture, f"picture {i}") for i, picture in enumerate(media)]
        grids = [self._grid_of(size, f"picture {i}") for i, size in enumerate(sizes)]
        rows, columns = (max((g[axis] for g in grids), default=0) for axis in (0, 1))
        ids = torch.zeros((len(media), len(self.quantizer.codebook_sizes), rows, columns), dtype=torch.long)
        with Reference(self):
            for h, w, part in self._passes(grids):
                latents = rearrange(self._encoded([media[i] for i in part], h, w), "b d h w -> b (h w) d")
                # Distances to every entry of a large codebook are more numbers than a tile has.
                codes = [self.quantizer(some).ids for some in latents.split(self._cells_per_pass, 1)]
                ids[part, :, :h, :w] = rearrange(torch.cat(codes, 1), "b (h w) k -> b k h w", h=h).cpu()
        return Codes(ids, _pairs(grids), _pairs(sizes))

    def decode(self, codes: Codes) -> list[Float[Tensor, "3 _ _"]]:
        """Pictures with values in [0, 1], cropped to ``codes.sizes`` where these are given.

        Of a residual quantizer's codes the first few codebooks, ``codes.ids[:, :n]``, are the same picture at a lower bit rate.

        Raises:
            ImageCodesError: more codebooks than this tokenizer has, or a code outside its codebook.
        """
        self._check_codes(codes)
        out: dict[int, Tensor] = {}
        with Reference(self):
            for h, w, part in self._passes(codes.lengths.tolist()):
                pixels = self._decoded(codes.ids[part, :, :h, :w].to(self.device)).add_(1).div_(2).clamp_(0, 1)
                out |= dict(zip(part, pixels.contiguous(), strict=True))
        pictures = [out[i] for i in range(len(codes))]
        if codes.sizes is not None:
            pictures = [p[:, :h, :w] for p, (h, w) in zip(pictures, codes.sizes.tolist(), strict=True)]
        return pictures

    def codebook_vectors(self, codebook: int = 0) -> Float[Tensor, "n d"]:
        """The vector behind every code of a codebook, those before it being at code 0: codes whose vectors are near look alike."""
        ids = torch.zeros(1, self.quantizer.codebook_sizes[codebook], codebook + 1, dtype=torch.long, device=self.device)
        ids[0, :, codebook] = torch.arange(ids.shape[1], device=self.device)
        with Reference(self):
            return self.quantizer.lookup(ids)[0].clone()

    @property
    def _cells_per_pass(self) -> int:
        return max(1, PIXELS_PER_PASS // (self.cell[0] * self.cell[1]))

    def _passes(self, grids: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, list[int]]]:
        """Height, width and members of every pass: pictures of one grid, as many as fit into memory."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (h, w) in enumerate(grids):
            groups.setdefault((h, w), []).append(i)
        for (h, w), members in groups.items():
            step = 1 if self.alone else max(1, self._cells_per_pass // (h * w))
            for first in range(0, len(members), step):
                yield h, w, members[first : first + step]

    def _encoded(self, pictures: Sequence[Tensor], rows: int, columns: int) -> Float[Tensor, "b d h w"]:
        """Latents of pictures of one grid; of a large picture, joined from those of its tiles."""
        tiling = self.tiling
        if tiling is None or rows * columns <= tiling.side**2:
            height, width = self.extent((rows, columns))
            return self.encoder(torch.stack([self._pixels(p, slice(0, height), slice(0, width)) for p in pictures]))
        (picture,), joined = pictures, torch.zeros(1, self.dim, rows, columns, device=self.device)
        for top, left in tiling.tiles(rows, columns, tiling.encoder_overlap, 1):
            down, across = (slice(w.start * n, w.stop * n) for w, n in zip((top, left), self.cell, strict=True))
            joined[:, :, top.range, left.range] += self._weighed(self.encoder(self._pixels(picture, down, across)[None]), top, left)
        return joined

    def _decoded(self, ids: Int[Tensor, "b k h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Pixels of codes of one grid; of a large picture, joined from those of its tiles."""
        tiling, (rows, columns) = self.tiling, ids.shape[2:]
        if tiling is None or rows * columns <= tiling.side**2:
            return self._reconstructed(ids)
        unit, _ = self.cell
        joined = torch.zeros(1, 3, *self.extent((rows, columns)), device=self.device)
        for top, left in tiling.tiles(rows, columns, tiling.decoder_overlap, unit):
            down, across = (slice(w.start // unit, w.stop // unit) for w in (top, left))
            joined[:, :, top.range, left.range] += self._weighed(self._reconstructed(ids[:, :, down, across]), top, left)
        return joined

    def _reconstructed(self, ids: Int[Tensor, "b k h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        latents = self.quantizer.lookup(rearrange(ids, "b k h w -> b (h w) k"))
        return self.decoder(rearrange(latents, "b (h w) d -> b d h w", h=ids.shape[2])).float()

    def _weighed(self, tile: Float[Tensor, "1 c h w"], top: Window, left: Window) -> Float[Tensor, "1 c h w"]:
        return tile * (top.weights[:, None] * left.weights).to(self.device)

    def _pixels(self, picture: Float[Tensor, "3 h w"], down: slice, across: slice) -> Float[Tensor, "3 h2 w2"]:
        """A part of a picture as the encoder sees it: in [-1, 1], the border repeated as far as the part goes beyond it."""
        part = picture[:, down, across].to(self.device, torch.float32)
        amounts = (0, across.stop - across.start - part.shape[2], 0, down.stop - down.start - part.shape[1])
        return F.pad(part[None], amounts, mode="replicate")[0] * 2 - 1

    def _grid_of(self, size: tuple[int, int], name: str) -> tuple[int, ...]:
        try:
            return self.grid(size)
        except ImageShapeError as error:
            raise ImageShapeError(f"{name}: {error}") from error

    def _check_codes(self, codes: Codes) -> None:
        sizes, count = self.quantizer.codebook_sizes, codes.ids.shape[1]
        if not 1 <= count <= len(sizes):
            raise ImageCodesError(f"codes of {count} codebooks given, 1 to {len(sizes)} wanted")
        least, most = (codes.ids.amin((0, 2, 3)), codes.ids.amax((0, 2, 3))) if codes.ids.numel() else ((), ())
        for k, (low, high) in enumerate(zip(least, most, strict=True)):
            if low < 0 or high >= sizes[k]:
                raise ImageCodesError(f"codes {int(low)} to {int(high)} of codebook {k} given, 0 to {sizes[k] - 1} wanted")


def picture_size(picture: Tensor, name: str) -> tuple[int, int]:
    """Height and width of a picture that can be encoded.

    Raises:
        ImageShapeError: it is not ``[3, height, width]`` of floats, or empty.
        ImageValueError: a value is not finite.
    """
    if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape or not picture.is_floating_point():
        raise ImageShapeError(f"{name}: {picture.dtype} {list(picture.shape)} given, floats [3, height, width] wanted")
    if not all(bound.isfinite() for bound in picture.aminmax()):
        channel, row, column = (int(i) for i in (~picture.isfinite()).nonzero()[0])
        value = float(picture[channel, row, column])
        raise ImageValueError(f"{name}: channel {channel} of row {row}, column {column} is {value:g}, numbers in [0, 1] are wanted")
    return picture.shape[1], picture.shape[2]


def _pairs(values: Sequence[Sequence[int]]) -> Int[Tensor, "b 2"]:
    return torch.tensor(values, dtype=torch.long).reshape(-1, 2)
