"""What all picture tokenizers share: pictures of any size to a grid of codes and back, at bounded memory. Subclasses bring the networks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.config import Config
from mmtp.nn.pyramid import scale_ends
from mmtp.tokenizers.autoencoder import Autoencoder
from mmtp.tokenizers.image.tiling import Tiling, Window
from mmtp.tokenizers.quantizers import Quantized, QuantizerConfig
from mmtp.tokenizers.reference import Reference
from mmtp.types import Codes, MmtpError, Modality, TokenizerSpec

PIXELS_PER_PASS = 2**20
"""Pictures pass the networks in groups of about this many pixels, so that memory does not grow with the length of a list."""


class ImageShapeError(MmtpError):
    """A picture that is not ``[3, height, width]`` floats, or not of a size that the tokenizer takes."""


class ImageValueError(MmtpError):
    """A picture with a value that is not a number, or infinite in float32."""


class ImageCodesError(MmtpError):
    """Codes that are not this tokenizer's."""


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Config):
    """What the configurations of all picture tokenizers have.

    Attributes:
        quantizer: any registered quantizer's configuration.
    """

    quantizer: QuantizerConfig


class ImageTokenizer(Autoencoder):
    """Encoder, quantizer and decoder between pictures ``[3, h, w]`` in [0, 1] and codes ``[k, rows, columns]``.

    Pictures are padded by repeating their border to whole cells and cropped again by ``decode``; nothing is ever resized. What is larger
    than ``tiling`` says passes the networks in overlapping tiles: their latents are joined before they are quantized.

    A quantizer of scales (next-scale codes) fixes the size of pictures, and its codes are a grid of one row, ``(1, n)``, scale by scale, as
    ``spec.scales`` tells them. The codes of the first few scales are a picture as well, a coarser one.

    Attributes:
        alone: whether every picture passes the networks by itself. A kernel may add in another order where a batch is larger, and where
            everything in a picture sees everything else, that may change a code; so codes cannot depend on the batch.
    """

    codes_error = ImageCodesError
    alone: ClassVar[bool] = True

    def __init__(self, config: ImageConfig, encoder: nn.Module, decoder: nn.Module, *, dim: int, cell: tuple[int, int]) -> None:
        """Of networks ``[b, 3, h, w] -> [b, dim, rows, columns]`` and back; a cell of the grid has (height, width) ``cell`` pixels."""
        super().__init__(config, encoder, decoder, dim=dim)
        self.cell = cell

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(
            modality=Modality.IMAGE,
            codebook_sizes=self.quantizer.codebook_sizes,
            scales=self.quantizer.scales,
            downsampling=self._downsampling,
            channels=3,
            residual=self.quantizer.residual,
            fingerprint=self._fingerprint.of(self.config, self),
        )

    @property
    def tiling(self) -> Tiling | None:
        """How large pictures are cut; None where no picture is."""
        return None

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Rows and columns of codes.

        Raises:
            ImageShapeError: the picture is of a size that this tokenizer does not take.
        """
        height, width = shape
        cells = -(-height // self.cell[0]), -(-width // self.cell[1])
        if not self.quantizer.scales:
            return cells
        if cells != self.cells(cells):
            most = self.extent(cells)
            raise ImageShapeError(
                f"{height} pixels high and {width} wide given, {cells[0]}x{cells[1]} cells, and the scales of this tokenizer end with "
                f"{self.cells(cells)[0]}x{self.cells(cells)[1]}: resize or crop to {most[0]}x{most[1]}"
            )
        return 1, self._ends[-1]

    def cells(self, grid: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the latents that have this grid of codes: the same, or those of the last of the quantizer's scales."""
        rows, columns = self.quantizer.scales[-1:] * 2 or grid
        return rows, columns

    def extent(self, grid: Sequence[int]) -> tuple[int, int]:
        """Height and width of the picture of whole cells that has this grid."""
        rows, columns = self.cells(grid)
        return rows * self.cell[0], columns * self.cell[1]

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
                latents = rearrange(self._encoded([media[i] for i in part], *self.cells((h, w))), "b d h w -> b (h w) d")
                # Distances to every entry of a large codebook are more numbers than a tile has.
                parts = (latents,) if self.quantizer.scales else latents.split(self._cells_per_pass, 1)
                codes = [self.quantizer(some).ids for some in parts]
                ids[part, :, :h, :w] = rearrange(torch.cat(codes, 1), "b (h w) k -> b k h w", h=h).cpu()
        return Codes(ids, _pairs(grids), _pairs(sizes))

    def decode(self, codes: Codes) -> list[Float[Tensor, "3 _ _"]]:
        """Pictures with values in [0, 1], cropped to ``codes.sizes`` where these are given.

        Of a residual quantizer's codes the first few codebooks, ``codes.ids[:, :n]``, are the same picture at a lower bit rate; where the
        quantizer has scales, so are the codes of the first few of them.

        Raises:
            ImageCodesError: more codebooks than this tokenizer has, a code outside its codebook, or not whole scales.
        """
        self.check_codes(codes.ids)
        self._check_grids(codes)
        out: dict[int, Tensor] = {}
        with Reference(self):
            for h, w, part in self._passes(codes.lengths.tolist()):
                pixels = self._decoded(codes.ids[part, :, :h, :w].to(self.device)).add_(1).div_(2).clamp_(0, 1)
                out |= dict(zip(part, pixels.contiguous(), strict=True))
        pictures = [out[i] for i in range(len(codes))]
        if codes.sizes is not None:
            pictures = [p[:, :h, :w] for p, (h, w) in zip(pictures, codes.sizes.tolist(), strict=True)]
        return pictures

    @property
    def _ends(self) -> tuple[int, ...]:
        """Where in the row of codes each of the quantizer's scales ends."""
        return scale_ends(self.quantizer.scales)

    @property
    def _downsampling(self) -> tuple[int, int]:
        """A row of codes shares the picture's width out among them, rounded up, so that ``grid * downsampling`` covers the picture."""
        if not self.quantizer.scales:
            return self.cell
        height, width = self.extent((1, self._ends[-1]))
        return height, -(-width // self._ends[-1])

    @property
    def _cells_per_pass(self) -> int:
        return max(1, PIXELS_PER_PASS // (self.cell[0] * self.cell[1]))

    def _passes(self, grids: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, list[int]]]:
        """Height, width and members of every pass: pictures of one grid, as many as fit into memory."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (h, w) in enumerate(grids):
            groups.setdefault((h, w), []).append(i)
        for (h, w), members in groups.items():
            step = 1 if self.alone else max(1, self._cells_per_pass // math.prod(self.cells((h, w))))
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
        tiling, (rows, columns) = self.tiling, self.cells(ids.shape[2:])
        latents = rearrange(self.quantizer.lookup(rearrange(ids, "b k h w -> b (h w) k")), "b (h w) d -> b d h w", h=rows)
        if tiling is None or rows * columns <= tiling.side**2:
            return self.decoder(latents).float()
        unit, _ = self.cell
        joined = torch.zeros(1, 3, *self.extent((rows, columns)), device=self.device)
        for top, left in tiling.tiles(rows, columns, tiling.decoder_overlap, unit):
            down, across = (slice(w.start // unit, w.stop // unit) for w in (top, left))
            joined[:, :, top.range, left.range] += self._weighed(self.decoder(latents[:, :, down, across]).float(), top, left)
        return joined

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

    def _check_grids(self, codes: Codes) -> None:
        """Refuses grids of codes that no picture has: where the quantizer has scales, all but rows of the first few of them."""
        if ends := self._ends:
            for i, given in enumerate(codes.lengths.tolist()):
                if given[0] != 1 or given[1] not in ends:
                    raise ImageCodesError(
                        f"picture {i}: a grid of {given} codes given; a row of the first scales has {', '.join(map(str, ends))}"
                    )


def picture_size(picture: Tensor, name: str) -> tuple[int, int]:
    """Height and width of a picture that can be encoded.

    Raises:
        ImageShapeError: it is not ``[3, height, width]`` of floats, or empty.
        ImageValueError: a value is not finite.
    """
    if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape or not picture.is_floating_point():
        raise ImageShapeError(f"{name}: {picture.dtype} {list(picture.shape)} given, floats [3, height, width] wanted")
    if not all(bound.float().isfinite() for bound in picture.aminmax()):
        channel, row, column = (int(i) for i in (~picture.float().isfinite()).nonzero()[0])
        value = float(picture[channel, row, column])
        raise ImageValueError(f"{name}: channel {channel} of row {row}, column {column} is {value:g}, numbers in [0, 1] are wanted")
    return picture.shape[1], picture.shape[2]


def _pairs(values: Sequence[Sequence[int]]) -> Int[Tensor, "b 2"]:
    return torch.tensor(values, dtype=torch.long).reshape(-1, 2)
