"""Discriminators of pictures and of sounds: they tell originals from reconstructions, place by place."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from mmtp.config import Config


@dataclass(frozen=True)
class Judgement:
    """What a discriminator says, at one resolution.

    Attributes:
        scores: above 0 where a place looks or sounds like an original.
        features: what every hidden layer saw, for feature matching.
    """

    scores: Float[Tensor, "b 1 _ _"]
    features: tuple[Tensor, ...]


class Discriminator(nn.Module, ABC):
    """What both have: one judgement for each of ``count`` resolutions, of media in [-1, 1]."""

    count: int

    @abstractmethod
    def forward(self, media: Float[Tensor, "b c *size"]) -> list[Judgement]: ...


@dataclass(frozen=True, kw_only=True)
class PatchConfig(Config):
    """Shape of the network.

    Attributes:
        width: channels of the first layer; each further one doubles them, up to eight times.
        layers: how often the plane is halved. With 3 a score is of a patch of 70 pixels, with 2 of one of 34, with 1 of one of 16.
    """

    width: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        if self.width < 1 or self.layers < 1:
            raise ValueError(f"width {self.width}, layers {self.layers}: each must be at least 1")


class PatchDiscriminator(Discriminator):
    """Judges every patch of a picture by itself (PatchGAN: Isola et al., arXiv 1611.07004, section 3.2.2 and appendix 6.1.2).

    With group norm in place of batch norm, so that no picture's judgement depends on the others of its batch, which differ between
    originals and reconstructions.
    """

    count = 1

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1)]
        for i in range(1, config.layers + 1):
            wider = config.width * min(2**i, 8)
            conv = nn.Conv2d(width, wider, 4, stride=2 if i < config.layers else 1, padding=1, bias=False)
            layers.append(nn.Sequential(conv, nn.GroupNorm(math.gcd(wider, 32), wider)))
            width = wider
        self.layers = nn.ModuleList(layers)
        self.score = nn.Conv2d(width, 1, 4, padding=1)

    def forward(self, media: Float[Tensor, "b 3 h w"]) -> list[Judgement]:
        """One judgement, of pixels in [-1, 1]; a side must have at least ``2**(layers + 1) + 2**layers`` pixels."""
        x = media
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return [Judgement(self.score(x), tuple(features))]


@dataclass(frozen=True, kw_only=True)
class SpectrogramConfig(Config):
    """Shape of the network.

    Attributes:
        windows: samples of a spectrum at each resolution; hops are a quarter of it.
        width: channels of every layer.
        dilations: over time, of the layers that halve the frequencies.
    """

    windows: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    width: int = 32
    dilations: tuple[int, ...] = (1, 2, 4)


class SpectrogramDiscriminator(Discriminator):
    """Tells originals from reconstructions by their complex spectra at several resolutions (EnCodec, arXiv 2210.13438, section 3.4)."""

    def __init__(self, config: SpectrogramConfig) -> None:
        super().__init__()
        self.config = config
        self.count = len(config.windows)
        self.resolutions = nn.ModuleList(_Resolution(window, config.width, config.dilations) for window in config.windows)

    def forward(self, media: Float[Tensor, "b 1 t"]) -> list[Judgement]:
        """One judgement per resolution, of samples in [-1, 1]."""
        return [resolution(media) for resolution in self.resolutions]


class _Resolution(nn.Module):
    hann: Tensor

    def __init__(self, window: int, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        layers = [nn.Conv2d(2, width, (3, 9), padding=(1, 4))]
        for dilation in dilations:
            layers.append(nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4)))
        layers.append(nn.Conv2d(width, width, 3, padding=1))
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)
        self.score = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, sound: Float[Tensor, "b 1 t"]) -> Judgement:
        window = len(self.hann)
        # Unitary, so that resolutions see numbers of one size.
        spectrum = torch.stft(
            sound[:, 0].float(), window, window // 4, window=self.hann, normalized=True, pad_mode="constant", return_complex=True
        )
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return Judgement(self.score(x), tuple(features))
