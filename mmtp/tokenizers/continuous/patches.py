"""Patches as they are: pixels and log-mel energies, to one vector per patch without a network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torchaudio.compliance.kaldi import fbank

import mmtp.config
from mmtp.tokenizers.audio.codec import AudioShapeError, check_sound
from mmtp.tokenizers.continuous.base import FeatureTokenizer, plane
from mmtp.tokenizers.image.grid import picture_size
from mmtp.types import Latents, Modality, TokenizerSpec

FRAMES_PER_PASS = 2**13
"""Spectra of long sounds are taken this many frames at a time, so that memory stays bounded."""


class PatchImageTokenizer(FeatureTokenizer):
    """Pictures ``[3, h, w]`` in [0, 1] to the pixels of each patch and back, exactly (Fuyu, Bavishi et al. 2023, "Fuyu-8B", architecture).

    A vector holds a patch channel by channel, row by row, as the weights of a patch embedding in a vision transformer lie. Pictures of
    any size are padded to whole patches by repeating their border and cropped again by ``decode``; nothing is resized.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(mmtp.config.Config):
        """How pictures are cut.

        Attributes:
            patch: pixels per side of a patch. Fuyu-8B has 30.
        """

        patch: int = 16

        def __post_init__(self) -> None:
            if self.patch < 1:
                raise ValueError(f"patch {self.patch}: at least 1 is wanted")

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-n // self.config.patch) for n in shape)

    def decode(self, latents: Latents) -> list[Float[Tensor, "3 _ _"]]:
        """Pictures with values in [0, 1], cropped to ``latents.sizes`` where these are given, else of whole patches.

        Raises:
            LatentsError: latents of another width, or not one for each cell of a grid.
        """
        planes = [plane(latents, i, self._describe().latent_dim) for i in range(len(latents))]
        p = self.config.patch
        pictures = [rearrange(x, "(c p q) h w -> c (h p) (w q)", p=p, q=p).clamp(0, 1) for x in planes]
        if latents.sizes is None:
            return pictures
        return [x[:, :h, :w] for x, (h, w) in zip(pictures, latents.sizes.tolist(), strict=True)]

    def _describe(self) -> TokenizerSpec:
        p = self.config.patch
        return TokenizerSpec(modality=Modality.IMAGE, downsampling=(p, p), channels=3, latent_dim=3 * p * p)

    def _size(self, medium: Tensor, index: int) -> tuple[int, ...]:
        return picture_size(medium, f"picture {index}")

    def _features(self, medium: Float[Tensor, "3 h w"]) -> Float[Tensor, "n d"]:
        p, (height, width) = self.config.patch, medium.shape[1:]
        pixels = F.pad(medium[None].float(), (0, -width % p, 0, -height % p), mode="replicate")
        return rearrange(pixels, "1 c (h p) (w q) -> (h w) (c p q)", p=p, q=p)


class PatchAudioTokenizer(FeatureTokenizer):
    """Sounds ``[1, t]`` in [-1, 1] to patches of their log-mel spectrogram (AST, Gong et al. 2021, arXiv 2104.01778, section 2.1).

    Spectra are Kaldi's: 25 ms Hann windows every 10 ms, 128 mel bands, standardised to mean 0 and deviation 0.5. Sounds of any length are
    padded with silence until patches hold every sample. The grid has an axis of time and one of bands, in this order, so that the
    vectors of a sound's start come first; ``downsampling`` is that of time. There is no way back.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(mmtp.config.Config):
        """How sounds are cut. The defaults are AST's, with patches that do not overlap (AST itself: ``stride=(10, 10)``).

        Attributes:
            sample_rate: samples per second. Sounds of another rate must be resampled before.
            frame_length: of a spectrum, in ms.
            frame_shift: from one spectrum to the next, in ms.
            bands: mel bands.
            patch: frames and bands of a patch.
            stride: frames and bands from one patch to the next. Bands beyond the last whole patch are left out.
            mean: of log energies over the data; that of AudioSet.
            std: of log energies over the data; that of AudioSet.
        """

        sample_rate: int = 16000
        frame_length: float = 25.0
        frame_shift: float = 10.0
        bands: int = 128
        patch: tuple[int, int] = (16, 16)
        stride: tuple[int, int] = (16, 16)
        mean: float = -4.2677393
        std: float = 4.5689974

        def __post_init__(self) -> None:
            if min(self.stride) < 1 or any(s > p for s, p in zip(self.stride, self.patch, strict=True)):
                raise ValueError(f"stride {self.stride}: 1 to patch {self.patch} is wanted, so that nothing is left out")
            if self.bands < self.patch[1]:
                raise ValueError(f"bands {self.bands}: at least as many as a patch has ({self.patch[1]}) are wanted")
            if self.hop < 1 or self.window < 2:
                raise ValueError(
                    f"frame_length {self.frame_length}, frame_shift {self.frame_shift}: less than a sample at {self.sample_rate} Hz"
                )
            if self.std <= 0:
                raise ValueError(f"std {self.std}: more than 0 is wanted")

        @property
        def window(self) -> int:
            """Samples of a spectrum, as Kaldi rounds them."""
            return int(self.sample_rate * self.frame_length * 0.001)

        @property
        def hop(self) -> int:
            """Samples from one spectrum to the next, as Kaldi rounds them."""
            return int(self.sample_rate * self.frame_shift * 0.001)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        (samples,), config = shape, self.config
        frames = 1 + max(0, -(-(samples - config.window) // config.hop))
        cells = 1 + max(0, -(-(frames - config.patch[0]) // config.stride[0]))
        return cells, 1 + (config.bands - config.patch[1]) // config.stride[1]

    def spectrogram(self, sound: Float[Tensor, "1 t"]) -> Float[Tensor, "frames bands"]:
        """Standardised log-mel energies of a sound, without padding: of as many whole windows as it holds."""
        config = self.config
        options = {
            "sample_frequency": config.sample_rate,
            "frame_length": config.frame_length,
            "frame_shift": config.frame_shift,
            "num_mel_bins": config.bands,
            "window_type": "hanning",
            "htk_compat": True,
        }
        frames = 1 + (sound.shape[1] - config.window) // config.hop
        parts = []
        for first in range(0, frames, FRAMES_PER_PASS):
            last = min(frames, first + FRAMES_PER_PASS) - 1
            parts.append(fbank(sound[:, first * config.hop : last * config.hop + config.window].float(), **options))
        return (torch.cat(parts) - config.mean) / (2 * config.std)

    def _describe(self) -> TokenizerSpec:
        config = self.config
        return TokenizerSpec(
            modality=Modality.AUDIO,
            downsampling=(config.stride[0] * config.hop,),
            channels=1,
            value_range=(-1.0, 1.0),
            sample_rate=float(config.sample_rate),
            latent_dim=config.patch[0] * config.patch[1],
        )

    def _size(self, medium: Tensor, index: int) -> tuple[int, ...]:
        check_sound(medium, f"sound {index}")
        if medium.shape[1] == 0:
            raise AudioShapeError(f"sound {index}: has no samples")
        return (medium.shape[1],)

    def _features(self, medium: Float[Tensor, "1 t"]) -> Float[Tensor, "n d"]:
        config, samples = self.config, medium.shape[1]
        frames = (self.grid((samples,))[0] - 1) * config.stride[0] + config.patch[0]
        whole = (frames - 1) * config.hop + config.window
        mel = self.spectrogram(F.pad(medium, (0, whole - samples)))
        patches = mel.unfold(0, config.patch[0], config.stride[0]).unfold(1, config.patch[1], config.stride[1])
        return rearrange(patches, "t f p q -> (t f) (p q)")
