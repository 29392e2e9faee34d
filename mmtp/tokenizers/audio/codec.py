"""What all audio tokenizers share: mono sounds of any length to codes and back, at constant memory. Subclasses bring the networks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.config import Config
from mmtp.nn.conv1d import Chain, reach
from mmtp.tokenizers.autoencoder import Autoencoder
from mmtp.tokenizers.quantizers import Quantized, QuantizerConfig, ResidualVQ, refuse_scales
from mmtp.tokenizers.reference import Reference
from mmtp.types import Codes, MmtpError, Modality, TokenizerSpec

SAMPLES_PER_PASS = 2**19
"""Long sounds pass the networks in windows of about this many samples, so that memory stays bounded."""

LOUDEST = 16.0
"""Samples above it are not loud but of another scale, such as that of 16-bit integers."""


class AudioShapeError(MmtpError):
    """A sound that is not ``[1, samples]`` floats."""


class AudioValueError(MmtpError):
    """A sound with a sample that is not a number, infinite, or of another scale."""


class AudioCodesError(MmtpError):
    """Codes that are not this tokenizer's."""


@dataclass(frozen=True, kw_only=True)
class AudioConfig(Config, ABC):
    """What the configurations of all audio tokenizers have.

    Attributes:
        sample_rate: samples per second. Sounds of another rate must be resampled before.
        causal: whether a code depends on samples up to the end of its frame only, so that sounds can be streamed.
        quantizer: any registered quantizer's configuration.
    """

    sample_rate: int = 16000
    causal: bool = False
    quantizer: QuantizerConfig = field(default_factory=ResidualVQ.Config)

    @property
    @abstractmethod
    def downsampling(self) -> int:
        """Samples per frame of codes (the hop)."""


class AudioTokenizer(Autoencoder):
    """Encoder, quantizer and decoder between sounds ``[1, t]`` in [-1, 1] and codes ``[k, frames]``.

    Sounds are padded to whole frames with silence and cropped again by ``decode``. Encoder and decoder see a bounded neighbourhood
    (``mmtp.nn.conv1d.reach``), so that long sounds are taken in windows with as much on both sides as a frame can see: the codes are
    those of the whole, at constant memory.

    Every sound passes the networks by itself. A kernel may add in another order where a batch is larger, and then in rare cases gives
    another code; seconds of sound are work enough to fill a device.
    """

    codes_error = AudioCodesError

    def __init__(self, config: AudioConfig, encoder: Chain, decoder: Chain, dim: int) -> None:
        """Of networks ``[b, 1, t] -> [b, dim, t / hop]`` and back."""
        super().__init__(config, encoder, decoder, dim=dim)
        refuse_scales(self.quantizer, "a row of frames")

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(
            modality=Modality.AUDIO,
            codebook_sizes=self.quantizer.codebook_sizes,
            downsampling=(self.config.downsampling,),
            channels=1,
            value_range=(-1.0, 1.0),
            sample_rate=float(self.config.sample_rate),
            residual=self.quantizer.residual,
            fingerprint=self._fingerprint.of(self.config, self),
        )

    @property
    def frame_rate(self) -> float:
        """Frames of codes per second."""
        return self.config.sample_rate / self.config.downsampling

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        (samples,) = shape
        return (-(-samples // self.config.downsampling),)

    def forward(self, waveform: Float[Tensor, "b 1 t"]) -> tuple[Float[Tensor, "b 1 t"], Quantized]:
        """Reconstruction of samples in [-1, 1], their number a multiple of ``downsampling``: what training calls."""
        if waveform.shape[-1] % self.config.downsampling:
            raise AudioShapeError(f"{waveform.shape[-1]} samples given, a multiple of {self.config.downsampling} wanted")
        quantized = self.quantizer(self.encoder(waveform).transpose(1, 2))
        return self.decoder(quantized.latents.transpose(1, 2)).float(), quantized

    def encode(self, media: Sequence[Tensor]) -> Codes:
        """Codes of sounds ``[1, samples]`` in [-1, 1], in evaluation mode and float32 whatever mode the module is in.

        Of a residual quantizer's codes the first few codebooks, ``codes.ids[:, :n]``, are the same sound at a lower bit rate, and
        ``decode`` takes them.

        Raises:
            AudioShapeError: a sound is not ``[1, samples]`` of floats, or empty.
            AudioValueError: a sample is not finite, or is of another scale.
        """
        for i, sound in enumerate(media):
            check_sound(sound, f"sound {i}")
            if sound.shape[1] == 0:
                raise AudioShapeError(f"sound {i}: has no samples")
        hop = self.config.downsampling
        sizes = [sound.shape[1] for sound in media]
        frames = [self.grid((size,))[0] for size in sizes]
        ids = torch.zeros((len(media), len(self.quantizer.codebook_sizes), max(frames, default=0)), dtype=torch.long)
        with Reference(self):
            around = reach(self.encoder, hop)
            for i, sound in enumerate(media):
                for start, stop, before, after in self._windows(frames[i], around):
                    waveform = _cut(sound, (start - before) * hop, (stop + after) * hop).to(self.device, torch.float32)
                    latents = self.encoder(waveform[None])[..., before : before + stop - start]
                    ids[i, :, start:stop] = self.quantizer(latents.transpose(1, 2)).ids[0].T.cpu()
        return Codes(ids, _column(frames), _column(sizes))

    def decode(self, codes: Codes) -> list[Float[Tensor, "1 _"]]:
        """Sounds with values in [-1, 1], cropped to ``codes.sizes`` where these are given.

        Raises:
            AudioCodesError: more codebooks than this tokenizer has, or a code outside its codebook.
        """
        self.check_codes(codes.ids)
        hop = self.config.downsampling
        sounds = []
        with Reference(self):
            around = reach(self.decoder)
            for i in range(len(codes)):
                ids = codes.item(i)
                sound = torch.zeros(1, ids.shape[1] * hop, device=self.device)
                for start, stop, before, after in self._windows(ids.shape[1], around):
                    sound[:, start * hop : stop * hop] = self.decode_within(ids[:, start - before : stop + after], before, after)
                sounds.append(sound.clamp_(-1, 1)[:, : None if codes.sizes is None else int(codes.sizes[i, 0])])
        return sounds

    def decode_within(self, ids: Int[Tensor, "k n"], before: int, after: int) -> Float[Tensor, "1 t"]:
        """Samples of some frames, with so many before and after them as their surroundings; in reference mode, not clamped."""
        hop = self.config.downsampling
        latents = self.quantizer.lookup(ids[None].transpose(1, 2).to(self.device))
        return self.decoder(latents.transpose(1, 2))[0, :, before * hop : (ids.shape[1] - after) * hop].float()

    def _windows(self, count: int, around: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
        """First and last frame of every window, and how many frames before and after them there are to see."""
        size = max(1, SAMPLES_PER_PASS // self.config.downsampling)
        for start in range(0, count, size):
            stop = min(count, start + size)
            yield start, stop, min(start, around[0]), min(count - stop, around[1])


def check_sound(sound: Tensor, name: str) -> None:
    """Refuses what is not a mono sound ``[1, samples]`` of floats in [-1, 1] or, as lossy coding and resampling make them, little above.

    Raises:
        AudioShapeError: the shape, the number of channels or the type is another.
        AudioValueError: a sample is not finite, or so large that it must be of another scale.
    """
    if sound.ndim != 2 or sound.shape[0] != 1 or not sound.is_floating_point():
        hint = "; mix channels down first" if sound.ndim == 2 and 1 < sound.shape[0] <= 8 else ""
        raise AudioShapeError(f"{name}: {sound.dtype} {list(sound.shape)} given, floats [1, samples] wanted{hint}")
    # Not a number is neither above nor below anything, and in a sound it is both least and greatest.
    least, most = sound.aminmax() if sound.numel() else (sound.new_zeros(()), sound.new_zeros(()))
    if not (least >= -LOUDEST and most <= LOUDEST):
        at = int((~(sound[0].abs() <= LOUDEST)).nonzero()[0])
        raise AudioValueError(f"{name}: sample {at} is {float(sound[0, at]):g}, numbers in [-1, 1] are wanted")


def _cut(sound: Float[Tensor, "1 t"], left: int, right: int) -> Float[Tensor, "1 t2"]:
    """Samples from ``left`` to ``right``, with silence after the sound's end."""
    part = sound[:, left:right]
    return F.pad(part, (0, right - left - part.shape[1]))


def _column(values: Sequence[int]) -> Int[Tensor, "b 1"]:
    return torch.tensor(values, dtype=torch.long).reshape(-1, 1)
