"""Training of tokenizers that understand: vision transformers that learn from teachers, from captions, or from both."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from rich.progress import track
from torch import Tensor, nn

from mmtp.config import Config, ConfigError, from_dict
from mmtp.data.media import contact_sheet
from mmtp.hub import save_pretrained
from mmtp.models.teachers import Teacher
from mmtp.tokenizers.continuous.vit import TimmViT
from mmtp.train.log import RunLog
from mmtp.train.losses.contrast import Contrast, ContrastConfig
from mmtp.train.losses.distill import DistillConfig, Distiller, Statistics, masked_patches, random_mask
from mmtp.train.pictures import PictureData
from mmtp.train.recipe import Recipe
from mmtp.train.trainer import Trainer
from mmtp.train.views import PictureViews, View

PICTURES = 12
"""How many a preview shows."""

PASS = 32
"""Pictures that pass a teacher at a time where its features are kept."""


@dataclass(frozen=True, kw_only=True)
class SemanticLossConfig(Config):
    """``[loss]`` of a vision transformer: the parts that a recipe may add, of which there must be one.

    Both look at one forward pass, so that beside a mask captions are matched with what is left of a picture (as in FLIP, arXiv 2212.00794).
    """

    distill: DistillConfig | None = None
    contrast: ContrastConfig | None = None

    def __post_init__(self) -> None:
        if self.distill is None and self.contrast is None:
            raise ValueError("a vision transformer learns from teachers or captions; give [loss.distill] or [loss.contrast]")


class SemanticBatch(NamedTuple):
    """What a step learns from.

    Attributes:
        pictures: values in [0, 1].
        captions: what is said of them; empty where that is nothing.
        mask: True at patches that the student does not see.
        targets: standardised features of every teacher; none where there are no teachers.
    """

    pictures: Float[Tensor, "b 3 h w"]
    captions: list[str]
    mask: Bool[Tensor, "b n"]
    targets: tuple[Tensor, ...]


class Learner(nn.Module):
    """A student and what it needs while it learns; the result of a run is its ``student``."""

    def __init__(self, student: TimmViT, distiller: Distiller | None, contrast: Contrast | None) -> None:
        super().__init__()
        self.student, self.distiller, self.contrast = student, distiller, contrast

    def values(self, pictures: Float[Tensor, "b 3 h w"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The student's features of pictures in [0, 1] of one size, of which it does not see the masked patches."""
        hidden = masked_patches(self.student, self.distiller.token, mask) if self.distiller and mask.any() else nullcontext()
        with hidden:
            return self.student(pictures).values[:, -mask.shape[1] :]


class Classroom:
    """The teachers of a recipe, and what they say of pictures.

    Args:
        config: which teachers.
        views: the training pictures.
        grid: of the student's patches.
        root: where relative paths start.
        device: where teachers compute.
        bfloat16: whether they compute in bfloat16.
    """

    def __init__(
        self, config: DistillConfig, views: PictureViews, grid: tuple[int, int], root: Path, device: torch.device, *, bfloat16: bool
    ) -> None:
        self.teachers = [Teacher(teacher, root, device) for teacher in config.teachers]
        self.views, self.grid, self.device, self.bfloat16 = views, grid, device, bfloat16
        self._kept: list[Tensor] = []

    def features(self, pictures: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b n _"]]:
        """What every teacher sees in pictures in [-1, 1]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return [teacher.features(pictures, self.grid) for teacher in self.teachers]

    def statistics(self, count: int) -> list[Statistics]:
        """Of every teacher's features over the first pictures that training draws."""
        parts = [self.features(self.views.pixels(self.views.draw(i, PASS)).to(self.device)) for i in range(-(-count // PASS))]
        return [Statistics.of(torch.cat(found)) for found in zip(*parts, strict=True)]

    def keep(self, distiller: Distiller, *, progress: bool) -> None:
        """Computes the targets of every fixed view, once, and keeps them as float16."""
        views = self.views.all()
        for start in track(range(0, len(views), PASS), "asking the teachers", disable=not progress, transient=True):
            found = self.features(self.views.pixels(views[start : start + PASS]).to(self.device))
            if not self._kept:
                self._kept = [torch.empty(len(views), *features.shape[1:], dtype=torch.float16) for features in found]
            for i, features in enumerate(found):
                self._kept[i][start : start + PASS] = distiller.standardise(i, features)

    def targets(self, views: Sequence[View], pictures: Float[Tensor, "b 3 h w"], distiller: Distiller) -> tuple[Tensor, ...]:
        """Standardised features of every teacher for some views, whose pictures in [-1, 1] are given."""
        if self._kept:
            places = [self.views.place(view) for view in views]
            return tuple(kept[places].to(self.device).float() for kept in self._kept)
        return tuple(distiller.standardise(i, features) for i, features in enumerate(self.features(pictures)))


class SemanticTask:
    """Distillation, contrast or both on batches of views.

    Args:
        learner: what trains.
        views: where the batches come from.
        classroom: the teachers, if the learner has any.
        recipe: seed and batch size.
    """

    def __init__(self, learner: Learner, views: PictureViews, classroom: Classroom | None, recipe: Recipe) -> None:
        self.module: nn.Module = learner
        self.learner, self.views, self.classroom = learner, views, classroom
        self.size, self.seed = recipe.run.batch, recipe.run.seed
        self.grid = patch_grid(learner.student, views.config.size)
        self.device = next(learner.parameters()).device

    def batch(self, step: int) -> SemanticBatch:
        distiller, classroom = self.learner.distiller, self.classroom
        views = self.views.draw(step, self.size)
        pictures = self.views.pixels(views).to(self.device)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        mask = random_mask(len(views), math.prod(self.grid), distiller.config.mask if distiller else 0.0, draw).to(self.device)
        targets = classroom.targets(views, pictures, distiller) if classroom and distiller else ()
        return SemanticBatch(pictures.add(1).div(2), self.views.captions(views), mask, targets)

    def loss(self, batch: SemanticBatch, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        values = self.learner.values(batch.pictures, batch.mask)
        total, metrics = values.new_zeros((), dtype=torch.float32), {"samples": float(len(values))}
        if self.learner.distiller:
            loss, found = self.learner.distiller(values, batch.targets, batch.mask)
            total, metrics = total + self.learner.distiller.config.weight * loss, metrics | found
        if self.learner.contrast:
            loss, found = self.learner.contrast(values, batch.captions)
            total, metrics = total + self.learner.contrast.config.weight * loss, metrics | found
        return total, metrics

    def preview(self, module: Any, log: RunLog, step: int) -> None:
        """Shows pictures, and below each what the student and every teacher see in it, as colours."""
        pictures = self.views.pixels(self.views.draw(0, PICTURES)).to(self.device)
        seen = [module.student(pictures.add(1).div(2)).values[:, -math.prod(self.grid) :]]
        if self.classroom:
            seen += [module.distiller.standardise(i, found) for i, found in enumerate(self.classroom.features(pictures))]
        rows = [pictures.add(1).div(2), *(feature_colours(found, self.grid, pictures.shape[-1]) for found in seen)]
        log.picture(step, contact_sheet([picture for row in rows for picture in row], columns=PICTURES))


def patch_grid(student: TimmViT, size: int) -> tuple[int, int]:
    """Rows and columns of the patches of a square picture."""
    rows, columns = student.grid((size, size))
    return rows, columns


def feature_colours(values: Float[Tensor, "b n d"], grid: tuple[int, int], size: int) -> Float[Tensor, "b 3 size size"]:
    """Features as pictures in [0, 1]: their three principal components over all pictures are red, green and blue.

    DINOv2 (arXiv 2304.07193, figure 1) shows features so.
    """
    flat = values.float().flatten(0, 1)
    centred = flat - flat.mean(0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    # A component has no sign of its own: its greatest weight is made positive, so that colours keep from preview to preview.
    signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    shades = (centred @ (components * signs).T).unflatten(0, values.shape[:2])
    low, high = (shades.flatten(0, 1).quantile(q, dim=0) for q in (0.02, 0.98))
    shades = ((shades - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return F.interpolate(rearrange(shades, "b (h w) c -> b c h w", h=grid[0]), (size, size))


def train_semantic(student: TimmViT, recipe: Recipe, folder: Path, *, data_root: Path, progress: bool = True) -> Path:
    """Trains a vision transformer and saves it in ``folder/result``; the towers of contrast, if any, in ``folder/result/towers``.

    Args:
        student: with new weights, on the device where it shall train.
        recipe: ``[data]`` is a :class:`~mmtp.train.pictures.PictureData` and ``[loss]`` a :class:`SemanticLossConfig`.
        folder: the run's folder.
        data_root: where relative paths of the sources and of teachers start.
        progress: whether to show bars.

    Raises:
        ConfigError: a key is unknown (names the nearest), sizes do not fit, or a teacher or a source is missing.
        TrainError: the run cannot go on.
    """
    data, loss = from_dict(PictureData, recipe.data, "data"), from_dict(SemanticLossConfig, recipe.loss, "loss")
    if data.size % student.patch[0] or data.size % student.patch[1]:
        raise ConfigError(f"data.size: {data.size} is no multiple of {max(student.patch)}, the pixels per side of a patch")
    grid = patch_grid(student, data.size)
    device = next(student.parameters()).device
    width = student.spec.latent_dim
    views = PictureViews(data, data_root, recipe.run.seed, views=loss.distill.views if loss.distill else 0, progress=progress)
    contrast = Contrast(loss.contrast, loss.contrast.towers(width)).to(device) if loss.contrast else None
    if contrast and not any(caption for samples in views.samples for _, caption in samples):
        raise ConfigError("loss.contrast: no picture of the sources has a caption or tags")
    classroom = distiller = None
    if loss.distill:
        try:
            classroom = Classroom(loss.distill, views, grid, data_root, device, bfloat16=recipe.run.precision == "bfloat16")
            statistics = classroom.statistics(loss.distill.statistics)
        except ConfigError as error:
            raise ConfigError(f"loss.distill.teachers: {error}") from error
        distiller = Distiller(loss.distill, width, statistics).to(device)
        if loss.distill.views:
            classroom.keep(distiller, progress=progress)
    task = SemanticTask(Learner(student, distiller, contrast), views, classroom, recipe)
    result: Any = Trainer(task, recipe.optim, recipe.run, folder, progress=progress).fit()
    saved = save_pretrained(result.student, folder / "result")
    if contrast:
        save_pretrained(result.contrast.towers, saved / "towers")
    return saved
