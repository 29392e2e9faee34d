"""Masked feature distillation: a student sees a picture with patches missing and says what frozen teachers see in every patch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from mmtp.config import Config
from mmtp.models.teachers import TeacherConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Config):
    """``[loss.distill]``: the teachers, and how the student is held to them.

    Attributes:
        teachers: frozen models; two in CogViT (GLM-4.5V and later), one for meaning and one for texture.
        mask: share of the patches that the student does not see; 0.35 in CogViT.
        masked: weight of the error at patches that are masked.
        visible: weight of the error at patches that are not. CogViT reconstructs masked patches only (0); a student that is used
            without a mask learns faster from both.
        cosine: weight of one less the cosine.
        smooth_l1: weight of the smooth L1 error. These two are those of AM-RADIO (arXiv 2312.06709, section 3.3).
        views: in how many fixed ways (crops, flips) each picture is seen. What the teachers say of them is computed once and kept in
            memory as float16. 0 makes new ones at every step and asks the teachers every time.
        statistics: pictures over which the teachers' features are standardised.
        weight: of the whole term.
    """

    teachers: tuple[TeacherConfig, ...]
    mask: float = 0.35
    masked: float = 1.0
    visible: float = 1.0
    cosine: float = 0.9
    smooth_l1: float = 0.1
    views: int = 0
    statistics: int = 1024
    weight: float = 1.0

    def __post_init__(self) -> None:
        names = [teacher.name for teacher in self.teachers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"teachers {names}: at least one, and each once, are wanted")
        if not 0 <= self.mask < 1:
            raise ValueError(f"mask {self.mask:g}: at least 0 and less than 1 is wanted")
        if min(self.masked, self.visible, self.cosine, self.smooth_l1) < 0 or not (self.cosine + self.smooth_l1):
            raise ValueError("masked, visible, cosine and smooth_l1: at least 0 are wanted, and one of the last two above it")
        if not (self.visible + (self.masked if self.mask else 0)):
            raise ValueError("masked, visible: no patch would count")
        if self.views < 0 or self.statistics < 1 or self.weight <= 0:
            raise ValueError(f"views {self.views}, statistics {self.statistics}, weight {self.weight:g}: are too small")


class Statistics(NamedTuple):
    """Mean and standard deviation of every channel of a teacher's features."""

    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]

    @staticmethod
    def of(features: Float[Tensor, "b n c"]) -> "Statistics":
        """Those of some features, over pictures and positions. A channel that never moves is only centred."""
        flat = features.flatten(0, 1).double()
        return Statistics._of(flat.mean(0), flat.std(0, correction=0))

    @staticmethod
    def of_moments(mean: Float[Tensor, " c"], square: Float[Tensor, " c"]) -> "Statistics":
        """Those of features whose mean and mean square are known."""
        return Statistics._of(mean, (square - mean.square()).clamp(min=0).sqrt())

    @staticmethod
    def _of(mean: Tensor, std: Tensor) -> "Statistics":
        return Statistics(mean.float(), torch.where(std > 1e-6, std, 1.0).float())


class Distiller(nn.Module):
    """What a student needs beside itself to learn from teachers: a mask token, an adapter per teacher, the teachers' statistics.

    Targets are standardised channel by channel with the mean and deviation that a teacher has on the training pictures: the plainest
    of the normalisations that Ranzinger et al. compare (PHI-S, arXiv 2410.01680), without a rotation. So every channel of every teacher
    has variance 1, and the teachers' losses are of one size without balancing; ``weight`` of a teacher tilts them. An adapter is a norm
    and two layers.

    Args:
        config: weights.
        width: of the student's features.
        statistics: of every teacher.
    """

    def __init__(self, config: DistillConfig, width: int, statistics: Sequence[Statistics]) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Parameter(0.02 * torch.randn(width))
        self.adapters = nn.ModuleList(adapter(width, len(found.mean)) for found in statistics)
        for i, found in enumerate(statistics):
            self.register_buffer(f"mean{i}", found.mean)
            self.register_buffer(f"std{i}", found.std)

    def standardise(self, teacher: int, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Features of a teacher as the student is to give them."""
        return (features - self.get_buffer(f"mean{teacher}")) / self.get_buffer(f"std{teacher}")

    def forward(
        self, values: Float[Tensor, "b n d"], targets: Sequence[Float[Tensor, "b n _"]], mask: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The weighted sum of the teachers' losses, and numbers for the log.

        Args:
            values: the student's features.
            targets: of every teacher, standardised.
            mask: True at patches that the student did not see.
        """
        config, metrics, total = self.config, {}, values.new_zeros((), dtype=torch.float32)
        for teacher, reader, target in zip(config.teachers, self.adapters, targets, strict=True):
            error, cosine = feature_error(reader(values), target, config.cosine, config.smooth_l1)
            loss = weighted_mean(error, torch.where(mask, config.masked, config.visible))
            total = total + teacher.weight * loss
            metrics |= {teacher.name: loss.item(), f"{teacher.name}.cosine": weighted_mean(cosine, ~mask).item()}
            if mask.any():
                metrics[f"{teacher.name}.masked_cosine"] = weighted_mean(cosine, mask).item()
        return total, metrics


def adapter(width: int, outputs: int) -> nn.Sequential:
    """What reads a teacher's features from a student's states."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, outputs))


def feature_error(
    output: Float[Tensor, "*b c"], target: Float[Tensor, "*b c"], cosine: float, smooth_l1: float
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Error of some features, position by position, and their cosine with the target.

    Args:
        output: of a student.
        target: standardised features of a teacher.
        cosine: weight of one less the cosine.
        smooth_l1: weight of the smooth L1 error, a mean over channels.
    """
    output = output.float()
    found = F.cosine_similarity(output, target, dim=-1)
    return cosine * (1 - found) + smooth_l1 * F.smooth_l1_loss(output, target, reduction="none").mean(-1), found


def weighted_mean(values: Float[Tensor, "b n"], weights: Tensor) -> Float[Tensor, ""]:
    """Mean of values, each counted so often."""
    return (values * weights).sum() / weights.sum()


def random_mask(count: int, patches: int, share: float, draw: torch.Generator) -> Bool[Tensor, "count patches"]:
    """True at exactly ``round(share * patches)`` patches of every picture, drawn evenly."""
    order = torch.rand(count, patches, generator=draw).argsort(1)
    return order < round(share * patches)


@contextmanager
def masked_patches(student: Any, token: Float[Tensor, " d"], mask: Bool[Tensor, "b n"]) -> Iterator[None]:
    """Within it, a transformer of timm finds ``token`` where a masked patch was embedded; positions are still added to it (BEiT, MAE).

    Args:
        student: a :class:`~mmtp.tokenizers.continuous.vit.TimmViT`.
        token: of the width of its patches.
        mask: True at patches that are not to be seen, in reading order; pictures are of one size.
    """
    model = student.model
    embedding = model.embeds.proj if isinstance(model, NaFlexVit) else model.patch_embed

    def cover(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return torch.where(mask.view(*output.shape[:-1], 1), token.to(output.dtype), output)

    handle = embedding.register_forward_hook(cover)
    try:
        yield
    finally:
        handle.remove()
