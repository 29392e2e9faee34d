"""How far a sound is from its original, as it is heard: mel spectra at several resolutions, and the waveform."""

from dataclasses import dataclass

import torch
import torchaudio.functional
from jaxtyping import Float
from torch import Tensor

from mmtp.config import Config
from mmtp.train.losses.terms import ReconstructionLoss, Term

FLOOR = 1e-5
"""What is quieter in a mel band counts as silence (DAC has the same)."""


@dataclass(frozen=True, kw_only=True)
class AudioReconstructionConfig(Config):
    """Weights of the terms of an audio tokenizer's loss.

    Attributes:
        mel: of the mel loss. DAC (arXiv 2306.06546, section 3.5) has 15, against a discriminator of 1.
        l1: of the absolute error of samples, which sets the phases.
        quantizer: of the quantizer's own loss.
        windows: samples of a spectrum at each scale; hops are a quarter of it.
        bands: mel bands at each scale.
    """

    mel: float = 1.0
    l1: float = 10.0
    quantizer: float = 1.0
    windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    bands: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)

    def __post_init__(self) -> None:
        if len(self.windows) != len(self.bands):
            raise ValueError("windows and bands must have one entry per scale")


class AudioReconstructionLoss(ReconstructionLoss):
    """Mel and sample errors.

    The mel loss is that of DAC (Kumar et al., arXiv 2306.06546, section 3.5): mean absolute difference of log mel magnitudes, summed over
    seven scales, of which the shortest hears clicks and the longest tells pitches apart.
    """

    def __init__(self, config: AudioReconstructionConfig, sample_rate: int) -> None:
        super().__init__()
        self.config = config
        for window, bands in zip(config.windows, config.bands, strict=True):
            bank = torchaudio.functional.melscale_fbanks(
                window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate, norm="slaney", mel_scale="slaney"
            )
            self.register_buffer(f"bank_{window}", bank, persistent=False)
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)

    def terms(self, output: Float[Tensor, "b 1 t"], target: Float[Tensor, "b 1 t"]) -> tuple[dict[str, Term], dict[str, float]]:
        """The terms; for the log ``mel``, ``l1`` and ``si_sdr`` (dB)."""
        with torch.autocast(output.device.type, enabled=False):
            output, target = output.float(), target.float()
            mel = self.mel(output, target)
            l1 = (output - target).abs().mean()
        metrics = {"mel": mel.item(), "l1": l1.item(), "si_sdr": si_sdr(output.detach(), target).mean().item()}
        return {"mel": Term(self.config.mel, mel), "l1": Term(self.config.l1, l1)}, metrics

    def mel(self, output: Float[Tensor, "b 1 t"], target: Float[Tensor, "b 1 t"]) -> Float[Tensor, ""]:
        """Mean absolute difference of log10 mel magnitudes, summed over scales."""
        total = output.new_zeros(())
        for window in self.config.windows:
            a, b = (self._log_mel(sound, window) for sound in (output, target))
            total = total + (a - b).abs().mean()
        return total

    def _log_mel(self, sound: Float[Tensor, "b 1 t"], window: int) -> Float[Tensor, "b n bands"]:
        spectrum = magnitudes(sound, getattr(self, f"hann_{window}"))
        return (spectrum.transpose(1, 2) @ getattr(self, f"bank_{window}")).clamp_min(FLOOR).log10()


def magnitudes(sound: Float[Tensor, "b 1 t"], hann: Float[Tensor, " window"]) -> Float[Tensor, "b f n"]:
    """Magnitudes of the short-time Fourier transform, four windows to every sample, silence beyond both ends."""
    window = len(hann)
    return torch.stft(sound[:, 0], window, window // 4, window=hann, pad_mode="constant", return_complex=True).abs()


def si_sdr(output: Float[Tensor, "b 1 t"], target: Float[Tensor, "b 1 t"]) -> Float[Tensor, " b"]:
    """Scale-invariant signal-to-distortion ratio in dB (arXiv 1811.02508, section 2) of sounds less their mean, within ±100."""
    output, target = (sound[:, 0] - sound[:, 0].mean(-1, keepdim=True) for sound in (output, target))
    tiny = torch.finfo(output.dtype).tiny
    scale = (output * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp_min(tiny)
    signal = (scale * target).square().sum(-1).clamp_min(tiny)
    distortion = (output - scale * target).square().sum(-1).clamp_min(tiny)
    return (10 * (signal / distortion).log10()).clamp(-100, 100)
