"""Convolutional video tokenizer: causal in time, as MAGVIT-v2 and Cosmos-Tokenizer are."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from mmtp.nn.conv import ChannelNorm
from mmtp.nn.conv1d import Chain
from mmtp.nn.conv3d import Downsample, FactorisedResidual, FrameConv, Upsample
from mmtp.tokenizers.quantizers import FSQ, QuantizerConfig
from mmtp.tokenizers.video.clip import VideoConfig, VideoTokenizer


class ConvVideoTokenizer(VideoTokenizer):
    """Videos to a grid of codes and back, by convolutions that see the frames up to their own and a neighbourhood of every frame.

    Time is treated as in MAGVIT-v2 (Yu et al., arXiv 2310.05737, section 3.2): the first frame is coded alone, so that pictures and
    videos have the same codes. Blocks are factorised into space and time as in Cosmos-Tokenizer (NVIDIA, arXiv 2501.03575, section 4).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(VideoConfig):
        """Shape of the network.

        Attributes:
            patch: pixels per side of a cell of the finest grid.
            widths: channels from the finest grid to the coarsest; each further one halves the grid in space.
            time_strides: by how much time is shortened with each halving; their product is the number of frames behind a code frame.
            encoder_blocks: residual blocks of the encoder per grid, finest first.
            decoder_blocks: residual blocks of the decoder per grid, finest first.
            quantizer: any registered quantizer's configuration.
        """

        patch: int = 4
        widths: tuple[int, ...] = (64, 128)
        time_strides: tuple[int, ...] = (4,)
        encoder_blocks: tuple[int, ...] = (1, 2)
        decoder_blocks: tuple[int, ...] = (2, 3)
        quantizer: QuantizerConfig = field(default_factory=FSQ.Config)

        def __post_init__(self) -> None:
            super().__post_init__()
            if not len(self.widths) == len(self.encoder_blocks) == len(self.decoder_blocks) == len(self.time_strides) + 1:
                raise ValueError(
                    "widths, encoder_blocks and decoder_blocks must have one entry per grid, time_strides one for each step between them"
                )
            if min(self.patch, *self.time_strides, *self.widths) < 1:
                raise ValueError(f"patch {self.patch}, time_strides {list(self.time_strides)}: each must be at least 1")

        @property
        def downsampling(self) -> int:
            """Pixels per side of a cell of codes."""
            return self.patch * 2 ** (len(self.widths) - 1)

        @property
        def frames_per_code(self) -> int:
            """Frames that a code frame stands for, all but the first, which stands for one."""
            return math.prod(self.time_strides)

    def __init__(self, config: Config) -> None:
        cell = (config.frames_per_code, config.downsampling, config.downsampling)
        super().__init__(config, _encoder(config), _decoder(config), dim=config.widths[-1], cell=cell)
        self.to(memory_format=torch.channels_last)


def _encoder(config: ConvVideoTokenizer.Config) -> Chain:
    layers: list[nn.Module] = [FrameConv(3, config.widths[0], config.patch, stride=config.patch)]
    for i, (width, blocks) in enumerate(zip(config.widths, config.encoder_blocks, strict=True)):
        if i > 0:
            layers.append(Downsample(config.widths[i - 1], width, (config.time_strides[i - 1], 2)))
        layers += [FactorisedResidual(width) for _ in range(blocks)]
    return Chain(*layers, ChannelNorm(config.widths[-1]))


def _decoder(config: ConvVideoTokenizer.Config) -> Chain:
    layers: list[nn.Module] = [FrameConv(config.widths[-1], config.widths[-1], 3)]
    for i in reversed(range(len(config.widths))):
        layers += [FactorisedResidual(config.widths[i]) for _ in range(config.decoder_blocks[i])]
        if i > 0:
            layers.append(Upsample(config.widths[i], config.widths[i - 1], (config.time_strides[i - 1], 2)))
    return Chain(*layers, ChannelNorm(config.widths[0]), nn.SiLU(), Upsample(config.widths[0], 3, (1, config.patch)))
