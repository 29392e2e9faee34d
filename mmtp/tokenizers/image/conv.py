"""Convolutional picture tokenizer: encoder, quantizer, decoder. Any height and width."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.nn.conv import ChannelNorm, Conv, ResidualConv, reach
from mmtp.tokenizers.image.grid import ImageConfig, ImageTokenizer
from mmtp.tokenizers.image.tiling import Tiling
from mmtp.tokenizers.quantizers import FSQ, QuantizerConfig


class ConvImageTokenizer(ImageTokenizer):
    """Pictures to a grid of codes and back, by convolutions that see a neighbourhood only.

    The stem is a pixel unshuffle (as in Cosmos-Tokenizer's patch stem), every further width halves the grid. The codes of a picture
    that is encoded in tiles are those of the whole.
    """

    alone = False

    @dataclass(frozen=True, kw_only=True)
    class Config(ImageConfig):
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
        cell = (config.downsampling, config.downsampling)
        super().__init__(config, _encoder(config), _decoder(config), dim=config.widths[-1], cell=cell)
        self.to(memory_format=torch.channels_last)

    @property
    def tiling(self) -> Tiling:
        """Tiles of one pass, which see as much around them as a code or a pixel can: codes are those of the whole picture."""
        encoder, decoder = 2 * reach(self.encoder, self.cell[0]), 2 * reach(self.decoder)
        side = max(math.isqrt(self._cells_per_pass), 2 * max(encoder, decoder))
        return Tiling(side=side, encoder_overlap=encoder, decoder_overlap=decoder, blend=False)


class _Layers(nn.Sequential):
    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return super().forward(input.contiguous(memory_format=torch.channels_last))


def _encoder(config: ConvImageTokenizer.Config) -> _Layers:
    # Borders repeat themselves: with zeros beyond them, a flat picture would get other codes along its borders.
    stem = Conv(3 * config.patch**2, config.widths[0], padding_mode="replicate")
    layers: list[nn.Module] = [nn.PixelUnshuffle(config.patch), stem]
    for i, (width, blocks) in enumerate(zip(config.widths, config.encoder_blocks, strict=True)):
        if i > 0:
            layers.append(nn.Conv2d(config.widths[i - 1], width, 2, stride=2))
        layers += [ResidualConv(width, kernel=config.encoder_kernel) for _ in range(blocks)]
    return _Layers(*layers, ChannelNorm(config.widths[-1]))


def _decoder(config: ConvImageTokenizer.Config) -> _Layers:
    layers: list[nn.Module] = [Conv(config.widths[-1], config.widths[-1])]
    for i in reversed(range(len(config.widths))):
        layers += [ResidualConv(config.widths[i]) for _ in range(config.decoder_blocks[i])]
        if i > 0:
            layers += [Conv(config.widths[i], 4 * config.widths[i - 1]), nn.PixelShuffle(2)]
    head = [ChannelNorm(config.widths[0]), nn.SiLU(), Conv(config.widths[0], 3 * config.patch**2), nn.PixelShuffle(config.patch)]
    return _Layers(*layers, *head)
