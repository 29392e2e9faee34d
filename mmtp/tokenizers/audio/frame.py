"""Audio tokenizer at frame rate: spectra in, spectra out, and nothing in between runs faster than the codes."""

from dataclasses import dataclass

from torch import nn

from mmtp.nn.conv1d import Chain, ConvNeXtBlock, StepNorm, TimeConv
from mmtp.nn.stft import Analysis, Extend, Synthesis, check_window
from mmtp.tokenizers.audio.codec import AudioConfig, AudioTokenizer


class FrameAudioTokenizer(AudioTokenizer):
    """One spectrum per frame to codes, and codes to one spectrum per frame, by ConvNeXt blocks over time.

    The decoder is that of Vocos (Siuzdak, arXiv 2306.00814, section 3), as WavTokenizer has it behind a quantizer (Ji et al., arXiv
    2408.16532, section 3); the encoder is its mirror image. With no layer at the sample rate it is far quicker than convolutions on
    the waveform, quick enough to be trained on a CPU.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AudioConfig):
        """Shape of the network, besides what all audio tokenizers have.

        Attributes:
            window: samples of a spectrum, whole hops. Where causal, sound comes ``window - hop`` samples after its codes.
            hop: samples per frame.
            width: channels of the blocks.
            encoder_blocks: ConvNeXt blocks before the quantizer.
            decoder_blocks: ConvNeXt blocks after it.
            kernel: frames that a block sees.
        """

        window: int = 1280
        hop: int = 320
        width: int = 256
        encoder_blocks: int = 4
        decoder_blocks: int = 6
        kernel: int = 7

        def __post_init__(self) -> None:
            check_window(self.window, self.hop)

        @property
        def downsampling(self) -> int:
            return self.hop

    def __init__(self, config: Config) -> None:
        super().__init__(config, _encoder(config), _decoder(config), config.width)


def _encoder(config: FrameAudioTokenizer.Config) -> Chain:
    analysis = Analysis(config.window, config.hop, causal=config.causal)
    embed = TimeConv(analysis.channels, config.width, 1, causal=config.causal)
    return Chain(analysis, embed, *_blocks(config, config.encoder_blocks))


def _decoder(config: FrameAudioTokenizer.Config) -> Chain:
    extend = Extend(config.window, config.hop, causal=config.causal)
    embed = TimeConv(config.width, config.width, config.kernel, causal=config.causal)
    synthesis = Synthesis(config.width, config.window, config.hop, causal=config.causal)
    return Chain(extend, embed, *_blocks(config, config.decoder_blocks), synthesis)


def _blocks(config: FrameAudioTokenizer.Config, count: int) -> list[nn.Module]:
    blocks = [ConvNeXtBlock(config.width, config.kernel, scale=1 / count, causal=config.causal) for _ in range(count)]
    return [StepNorm(config.width), *blocks, StepNorm(config.width)]
