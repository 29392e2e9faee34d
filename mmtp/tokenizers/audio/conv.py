"""Convolutional audio tokenizer: strided convolutions on the waveform, as in SoundStream, EnCodec and DAC."""

import math
from dataclasses import dataclass
from functools import partial

from torch import nn

from mmtp.nn.conv1d import Chain, ResidualUnit, Snake, StepNorm, TimeConv, Upsample
from mmtp.tokenizers.audio.codec import AudioConfig, AudioTokenizer


class ConvAudioTokenizer(AudioTokenizer):
    """Waveform to codes by convolutions that double the channels wherever they shorten time, and back.

    The network is that of DAC (Kumar et al., arXiv 2306.06546, section 3): residual units of growing dilation, snake activations,
    weight-normalised kernels. Latents are normalised step by step, so that scalar quantizers have their range from the start. Causal,
    it is laid out as the streaming network of EnCodec (Défossez et al., arXiv 2210.13438, section 3.1). It works at the full sample
    rate, which is slow without an accelerator; ``audio-frame`` is the quick one.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AudioConfig):
        """Shape of the network, besides what all audio tokenizers have.

        Attributes:
            strides: how much each stage of the encoder shortens time; their product is the hop. DAC has (2, 4, 5, 8) at 16 kHz.
            encoder_width: channels at the full sample rate; each stage doubles them. DAC has 64.
            decoder_width: channels of the decoder at the full sample rate. DAC has 96.
            dilations: of the residual units of each stage.
        """

        strides: tuple[int, ...] = (2, 4, 5, 8)
        encoder_width: int = 32
        decoder_width: int = 48
        dilations: tuple[int, ...] = (1, 3, 9)

        def __post_init__(self) -> None:
            if not self.strides or min(self.strides) < 2:
                raise ValueError(f"strides {list(self.strides)}: at least one, and each at least 2, are wanted")

        @property
        def downsampling(self) -> int:
            return math.prod(self.strides)

        @property
        def dim(self) -> int:
            """Width of latents."""
            return self.encoder_width * 2 ** len(self.strides)

    def __init__(self, config: Config) -> None:
        super().__init__(config, _encoder(config), _decoder(config), config.dim)


def _encoder(config: ConvAudioTokenizer.Config) -> Chain:
    conv = partial(TimeConv, causal=config.causal, weight_norm=True)
    width = config.encoder_width
    layers: list[nn.Module] = [conv(1, width, 7)]
    for stride in config.strides:
        layers += [ResidualUnit(width, dilation, causal=config.causal) for dilation in config.dilations]
        layers += [Snake(width), conv(width, 2 * width, 2 * stride, stride=stride)]
        width *= 2
    return Chain(*layers, Snake(width), conv(width, width, 3), StepNorm(width))


def _decoder(config: ConvAudioTokenizer.Config) -> Chain:
    conv = partial(TimeConv, causal=config.causal, weight_norm=True)
    width = config.decoder_width * 2 ** len(config.strides)
    layers: list[nn.Module] = [conv(config.dim, width, 7)]
    for stride in reversed(config.strides):
        layers += [Snake(width), Upsample(width, width // 2, stride, causal=config.causal, weight_norm=True)]
        width //= 2
        layers += [ResidualUnit(width, dilation, causal=config.causal) for dilation in config.dilations]
    return Chain(*layers, Snake(width), conv(width, 1, 7), nn.Tanh())
