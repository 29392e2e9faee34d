"""A discriminator of sounds, and the losses of both sides."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from mmtp.config import Config


@dataclass(frozen=True)
class Judgement:
    """What one resolution of a discriminator says.

    Attributes:
        scores: above 0 where a place sounds like an original.
        features: what every layer saw, for feature matching.
    """

    scores: Float[Tensor, "b 1 n f"]
    features: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(Config):
    """Shape of the network.

    Attributes:
        windows: samples of a spectrum at each resolution; hops are a quarter of it.
        width: channels of every layer.
        dilations: over time, of the layers that halve the frequencies.
    """

    windows: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    width: int = 32
    dilations: tuple[int, ...] = (1, 2, 4)


class SpectrogramDiscriminator(nn.Module):
    """Tells originals from reconstructions by their complex spectra at several resolutions (EnCodec, arXiv 2210.13438, section 3.4)."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.resolutions = nn.ModuleList(_Resolution(window, config.width, config.dilations) for window in config.windows)

    def forward(self, sound: Float[Tensor, "b 1 t"]) -> list[Judgement]:
        """One judgement per resolution, of samples in [-1, 1]."""
        return [resolution(sound) for resolution in self.resolutions]


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


def discriminator_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Float[Tensor, ""]:
    """Hinge loss of the discriminator, mean over resolutions: originals above 1, reconstructions (given detached) below -1."""
    return _mean(F.relu(1 - r.scores.float()).mean() + F.relu(1 + f.scores.float()).mean() for r, f in zip(real, fake, strict=True))


def generator_loss(fake: Sequence[Judgement]) -> Float[Tensor, ""]:
    """Hinge loss of the tokenizer, mean over resolutions: reconstructions above 1."""
    return _mean(F.relu(1 - f.scores.float()).mean() for f in fake)


def feature_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Float[Tensor, ""]:
    """Feature matching: mean absolute difference of every layer's features, relative to the original's (EnCodec, section 3.4)."""
    terms = []
    for r, f in zip(real, fake, strict=True):
        for a, b in zip(r.features, f.features, strict=True):
            a, b = a.detach().float(), b.float()
            terms.append((a - b).abs().mean() / a.abs().mean().clamp_min(1e-8))
    return _mean(terms)


def _mean(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()
