"""Convolutional picture tokenizer: encoder, quantizer, decoder. Any height and width."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.config import Config as BaseConfig
from mmtp.nn.conv import ChannelNorm, Conv, ResidualConv
from mmtp.tokenizers.quantizers import FSQ, Quantized, QuantizerConfig
from mmtp.tokenizers.reference import FingerprintCache, Reference
from mmtp.types import Codes, MmtpError, Modality, TokenizerSpec

PIXELS_PER_PASS = 2**20
"""Pictures are encoded in passes of about this many pixels, so that memory does not grow with the length of a list."""


class ImageShapeError(MmtpError):
    """A picture that is not ``[3, height, width]`` floats."""


class ConvImageTokenizer(nn.Module):
    """Pictures to a grid of codes and back, by convolutions that see a neighbourhood only.

    The stem is a pixel unshuffle (as in Cosmos-Tokenizer's patch stem), every further width halves the grid. Pictures are padded
    by repeating their border to whole cells and cropped again by ``decode``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """Shape of the network.

        Attributes:
            patch: pixels per side of a cell of the finest grid.
            widths: channels from the finest grid to the coarsest; each further one halves the grid.
            encoder_blocks: residual blocks of the encoder per grid, finest first.
            decoder_blocks: residual blocks of the decoder per grid, finest first.
            encoder_kernel: kernel of the encoder's residual blocks. 1: a code sees its own cell and ``patch`` pixels around it,
                so a flat background has one code wherever it lies, which makes streams easy to predict; 3: a code sees most of
                a small picture, which codes it a little more closely and lets everything around into every code.
            quantizer: any registered quantizer's configuration.
        """

        patch: int = 4
        widths: tuple[int, ...] = (64, 128)
        encoder_blocks: tuple[int, ...] = (1, 2)
        decoder_blocks: tuple[int, ...] = (2, 3)
        encoder_kernel: int = 1
        quantizer: QuantizerConfig = field(default_factory=FSQ.Config)

        def __post_init__(self) -> None:
            if not len(self.widths) == len(self.encoder_blocks) == len(self.decoder_blocks) > 0:
                raise ValueError("widths, encoder_blocks and decoder_blocks must have one entry per grid")
            if self.encoder_kernel not in (1, 3):
                raise ValueError(f"encoder_kernel is 1 or 3, not {self.encoder_kernel}")

        @property
        def downsampling(self) -> int:
            """Pixels per side of a cell of codes."""
            return self.patch * 2 ** (len(self.widths) - 1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.quantizer = config.quantizer.build(dim=config.widths[-1])
        self.decoder = _decoder(config)
        self.to(memory_format=torch.channels_last)
        self._fingerprint = FingerprintCache()

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(
            modality=Modality.IMAGE,
            codebook_sizes=self.quantizer.codebook_sizes,
            downsampling=(self.config.downsampling,) * 2,
            channels=3,
            fingerprint=self._fingerprint.of(self.config, self),
        )

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        height, width = shape
        return -(-height // self.config.downsampling), -(-width // self.config.downsampling)

    def num_tokens(self, shape: Sequence[int]) -> int:
        rows, columns = self.grid(shape)
        return rows * columns * len(self.quantizer.codebook_sizes)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b 3 h w"], Quantized]:
        """Reconstruction of pixels in [-1, 1], height and width multiples of ``downsampling``: what training calls."""
        latents = self.encoder(pixels.contiguous(memory_format=torch.channels_last))
        quantized = self.quantizer(rearrange(latents, "b d h w -> b (h w) d"))
        return self._reconstruct(quantized.latents, latents.shape[2]), quantized

    def encode(self, media: Sequence[Tensor]) -> Codes:
        """Codes of pictures ``[3, h, w]`` with values in [0, 1], in evaluation mode and float32 whatever mode the module is in.

        Pictures are grouped by padded size, so that none is padded for the sake of another.

        Raises:
            ImageShapeError: a picture is not ``[3, height, width]`` of floats, or empty.
        """
        sizes = []
        for i, picture in enumerate(media):
            if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape or not picture.is_floating_point():
                raise ImageShapeError(f"picture {i}: {picture.dtype} {list(picture.shape)} given, floats [3, height, width] wanted")
            sizes.append((picture.shape[1], picture.shape[2]))
        grids = [self.grid(size) for size in sizes]
        rows, columns = (max((g[axis] for g in grids), default=0) for axis in (0, 1))
        ids = torch.zeros((len(media), len(self.quantizer.codebook_sizes), rows, columns), dtype=torch.long)
        cell = self.config.downsampling
        with Reference(self):
            for h, w, part in self._passes(grids):
                pixels = torch.stack([self._padded(media[i], h * cell, w * cell) for i in part])
                latents = self.encoder((pixels * 2 - 1).contiguous(memory_format=torch.channels_last))
                codes = self.quantizer(rearrange(latents, "b d h w -> b (h w) d")).ids
                ids[part, :, :h, :w] = rearrange(codes, "b (h w) k -> b k h w", h=h).cpu()
        return Codes(ids, _pairs(grids), _pairs(sizes))

    def decode(self, codes: Codes) -> list[Float[Tensor, "3 _ _"]]:
        """Pictures with values in [0, 1], cropped to ``codes.sizes`` where these are given."""
        out: dict[int, Tensor] = {}
        with Reference(self):
            for h, w, part in self._passes(codes.lengths.tolist()):
                ids = rearrange(codes.ids[part, :, :h, :w], "b k h w -> b (h w) k").to(self._device)
                pixels = self._reconstruct(self.quantizer.lookup(ids), h).add(1).div(2).clamp(0, 1)
                out |= dict(zip(part, pixels.contiguous(), strict=True))
        pictures = [out[i] for i in range(len(codes))]
        if codes.sizes is not None:
            pictures = [p[:, :h, :w] for p, (h, w) in zip(pictures, codes.sizes.tolist(), strict=True)]
        return pictures

    def codebook_vectors(self, codebook: int = 0) -> Float[Tensor, "n d"]:
        """The vector behind every code of a codebook: codes whose vectors are near look alike."""
        ids = torch.arange(self.quantizer.codebook_sizes[codebook], device=self._device)
        with Reference(self):
            return self.quantizer.lookup(ids[None, :, None])[0].clone()

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _passes(self, grids: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, list[int]]]:
        """Height, width and members of every pass: pictures of one grid, as many as fit into memory."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (h, w) in enumerate(grids):
            groups.setdefault((h, w), []).append(i)
        for (h, w), members in groups.items():
            step = max(1, PIXELS_PER_PASS // (h * w * self.config.downsampling**2))
            for first in range(0, len(members), step):
                yield h, w, members[first : first + step]

    def _padded(self, picture: Float[Tensor, "3 h w"], height: int, width: int) -> Float[Tensor, "3 h2 w2"]:
        amounts = (0, width - picture.shape[2], 0, height - picture.shape[1])
        return F.pad(picture[None].to(self._device, torch.float32), amounts, mode="replicate")[0]

    def _reconstruct(self, latents: Float[Tensor, "b n d"], rows: int) -> Float[Tensor, "b 3 h w"]:
        plane = rearrange(latents, "b (h w) d -> b d h w", h=rows)
        return self.decoder(plane.contiguous(memory_format=torch.channels_last)).float()


def _pairs(values: Sequence[Sequence[int]]) -> Int[Tensor, "b 2"]:
    return torch.tensor(values, dtype=torch.long).reshape(-1, 2)


def _encoder(config: ConvImageTokenizer.Config) -> nn.Sequential:
    # Borders repeat themselves: with zeros beyond them, a flat picture would get other codes along its borders.
    stem = Conv(3 * config.patch**2, config.widths[0], padding_mode="replicate")
    layers: list[nn.Module] = [nn.PixelUnshuffle(config.patch), stem]
    for i, (width, blocks) in enumerate(zip(config.widths, config.encoder_blocks, strict=True)):
        if i > 0:
            layers.append(nn.Conv2d(config.widths[i - 1], width, 2, stride=2))
        layers += [ResidualConv(width, kernel=config.encoder_kernel) for _ in range(blocks)]
    return nn.Sequential(*layers, ChannelNorm(config.widths[-1]))


def _decoder(config: ConvImageTokenizer.Config) -> nn.Sequential:
    layers: list[nn.Module] = [Conv(config.widths[-1], config.widths[-1])]
    for i in reversed(range(len(config.widths))):
        layers += [ResidualConv(config.widths[i]) for _ in range(config.decoder_blocks[i])]
        if i > 0:
            layers += [Conv(config.widths[i], 4 * config.widths[i - 1]), nn.PixelShuffle(2)]
    head = [ChannelNorm(config.widths[0]), nn.SiLU(), Conv(config.widths[0], 3 * config.patch**2), nn.PixelShuffle(config.patch)]
    return nn.Sequential(*layers, *head)
