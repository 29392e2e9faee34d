"""Training of tokenizers of pictures, videos and sounds: reconstruct media through the quantizer."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.config import Config, ConfigError, build_config, from_dict
from mmtp.data.media import contact_sheet
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.tokenizers.continuous.vit import TimmViT
from mmtp.tokenizers.image.grid import ImageShapeError
from mmtp.train.log import RunLog
from mmtp.train.losses.adversarial import AdversarialConfig, Adversary
from mmtp.train.losses.audio import AudioReconstructionConfig, AudioReconstructionLoss
from mmtp.train.losses.balance import BalanceConfig, Balancer
from mmtp.train.losses.criterion import Criterion
from mmtp.train.losses.discriminators import PatchConfig, PatchDiscriminator, SpectrogramConfig, SpectrogramDiscriminator
from mmtp.train.losses.perceptual import PerceptualConfig, build_perceptual
from mmtp.train.losses.reconstruction import PictureReconstructionLoss, ReconstructionConfig
from mmtp.train.pictures import PictureData, PictureMix
from mmtp.train.recipe import Recipe
from mmtp.train.semantic_trainer import train_semantic
from mmtp.train.sounds import SoundData, SoundMix, spectrogram
from mmtp.train.trainer import OptimConfig, Trainer
from mmtp.train.videos import VideoData, VideoMix
from mmtp.types import Modality

PICTURES, VIDEOS, SOUNDS = 16, 4, 4
"""How many a preview shows."""

TERMS = ("l1", "l2", "mel", "perceptual", "adversarial", "feature")
"""Terms of a loss that act on the reconstruction."""


@dataclass(frozen=True, kw_only=True)
class PictureAdversarialConfig(AdversarialConfig):
    """``[loss.adversarial]`` of pictures: ``discriminator`` judges patches."""

    discriminator: PatchConfig = field(default_factory=PatchConfig)


@dataclass(frozen=True, kw_only=True)
class SoundAdversarialConfig(AdversarialConfig):
    """``[loss.adversarial]`` of sounds: ``discriminator`` judges spectra."""

    discriminator: SpectrogramConfig = field(default_factory=SpectrogramConfig)


@dataclass(frozen=True, kw_only=True)
class PictureLossConfig(ReconstructionConfig):
    """``[loss]`` of a tokenizer of pictures or videos: weights, and the parts that a recipe may add. Of videos it is over single frames."""

    perceptual: PerceptualConfig | None = None
    adversarial: PictureAdversarialConfig | None = None
    balance: BalanceConfig | None = None

    def __post_init__(self) -> None:
        _check_balance(self)


@dataclass(frozen=True, kw_only=True)
class SoundLossConfig(AudioReconstructionConfig):
    """``[loss]`` of an audio tokenizer: weights, and the parts that a recipe may add."""

    adversarial: SoundAdversarialConfig | None = None
    balance: BalanceConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_balance(self)


class TokenizerTask(ABC):
    """Reconstruction of batches of a mix.

    Args:
        module: a tokenizer whose ``forward`` gives (reconstruction, Quantized).
        data: where the batches come from.
        size: media per batch.
        criterion: what reconstructions are measured by.
        optim: the tokenizer's optimizer; a discriminator has the same but for its rate and betas.
    """

    def __init__(self, module: Any, data: PictureMix | VideoMix | SoundMix, size: int, criterion: Criterion, optim: OptimConfig) -> None:
        self.module: nn.Module = module
        self.data, self.size, self.criterion = data, size, criterion
        self.codebook_sizes: tuple[int, ...] = module.quantizer.codebook_sizes
        self.device = next(module.parameters()).device
        # Kernels are built first to last, and a weight-normalised one keeps its direction last.
        self.last_layer = [p for p in module.decoder.parameters() if p.ndim > 1][-1]
        own = criterion.adversary.config if criterion.adversary else None
        self.criterion_optim = replace(optim, lr=own.lr, betas=own.betas, muon_lr=0.0) if own else optim

    def batch(self, step: int) -> Float[Tensor, "b c *size"]:
        return self.data.batch(step, self.size).to(self.device)

    def loss(self, batch: Float[Tensor, "b c *size"], step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        output, quantized = self.module(batch)
        output, target = self.judged(output), self.judged(batch)
        loss, metrics = self.criterion(output, target, quantized, step, self.last_layer)
        self._output = output.detach()
        return loss, metrics | usage(quantized.ids, self.codebook_sizes) | {"samples": float(len(batch))}

    def criterion_loss(self, batch: Float[Tensor, "b c *size"], step: int) -> tuple[Float[Tensor, ""], dict[str, float]] | None:
        """The discriminator's loss on what the tokenizer has just made of the batch."""
        if self.criterion.adversary is None or not self.criterion.plays(step):
            return None
        return self.criterion.adversary(self._output, self.judged(batch))

    def judged(self, media: Float[Tensor, "b c *size"]) -> Tensor:
        """Media as losses see them."""
        return media

    @abstractmethod
    def preview(self, module: nn.Module, log: RunLog, step: int) -> None: ...


class PictureTask(TokenizerTask):
    """Shows every original beside its reconstruction."""

    def preview(self, module: nn.Module, log: RunLog, step: int) -> None:
        batch = self.data.batch(0, PICTURES).to(self.device)
        pairs = torch.stack([batch, module(batch)[0]], 1).flatten(0, 1).add(1).div(2)
        log.picture(step, contact_sheet(list(pairs.clamp(0, 1)), columns=8))


class VideoTask(TokenizerTask):
    """Losses see every frame as a picture. Shows the frames of every original in a row, above those of its reconstruction."""

    def judged(self, media: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "n 3 h w"]:
        return rearrange(media, "b c t h w -> (b t) c h w")

    def preview(self, module: nn.Module, log: RunLog, step: int) -> None:
        batch = self.data.batch(0, VIDEOS).to(self.device)
        pairs = torch.stack([batch, module(batch)[0]], 1).add(1).div(2).clamp(0, 1)
        log.picture(step, contact_sheet(list(rearrange(pairs, "b pair c t h w -> (b pair t) c h w")), columns=batch.shape[2]))


class SoundTask(TokenizerTask):
    """Shows the spectrogram of every original above that of its reconstruction, and lets both be heard."""

    def preview(self, module: Any, log: RunLog, step: int) -> None:
        batch = self.data.batch(0, SOUNDS).to(self.device)
        output = module(batch)[0]
        log.picture(step, contact_sheet([spectrogram(sound) for sound in (*batch, *output)], columns=len(batch)))
        for name, sounds in (("original", batch), ("reconstruction", output)):
            log.sound(step, name, torch.cat(list(sounds), 1).cpu(), module.config.sample_rate)


def usage(ids: Int[Tensor, "b n k"], codebook_sizes: tuple[int, ...]) -> dict[str, float]:
    """How varied a batch's codes are: distinct codes, as a share of those that there could be (codebook or positions, whichever are fewer).

    Args:
        ids: codes; -1 where quantizer dropout has left one out, which counts for nothing.
        codebook_sizes: entries of every codebook.

    Returns:
        ``usage`` over all codebooks that have codes, and ``usage.0``, ``usage.1``, … where there are several.
    """
    found = {}
    for k, size in enumerate(codebook_sizes):
        codes = ids[..., k][ids[..., k] >= 0]
        if codes.numel():
            found[f"usage.{k}"] = len(codes.unique()) / min(size, codes.numel())
    mean = {"usage": sum(found.values()) / len(found)} if found else {}
    return mean | (found if len(codebook_sizes) > 1 else {})


def picture_task(module: Any, data: PictureData, loss: PictureLossConfig, recipe: Recipe, root: Path, *, progress: bool) -> TokenizerTask:
    """The task of a picture tokenizer.

    Raises:
        ConfigError: sizes do not fit the tokenizer or the discriminator; a source or a network's weights are missing.
    """
    try:
        whole = module.extent(module.grid((data.size, data.size)))
    except ImageShapeError as error:
        raise ConfigError(f"data.size: {error}") from error
    if whole[0] != data.size:
        raise ConfigError(f"data.size: {data.size} is no multiple of {module.cell[0]}, the pixels per side of a code")
    criterion = _picture_criterion(module, data.size, loss, root)
    mix = PictureMix(data, root, recipe.run.seed, progress=progress)
    return PictureTask(module, mix, recipe.run.batch, criterion, recipe.optim)


def video_task(module: Any, data: VideoData, loss: PictureLossConfig, recipe: Recipe, root: Path, *, progress: bool) -> TokenizerTask:
    """The task of a video tokenizer.

    Raises:
        ConfigError: sizes or the number of frames do not fit the tokenizer or the discriminator; a source or weights are missing.
    """
    step = module.config.frames_per_code
    if (data.frames - 1) % step:
        raise ConfigError(f"data.frames: {data.frames} is not one more than a multiple of {step}, the frames that a code frame stands for")
    if data.size % module.config.downsampling:
        raise ConfigError(f"data.size: {data.size} is no multiple of {module.config.downsampling}, the pixels per side of a code")
    criterion = _picture_criterion(module, data.size, loss, root)
    mix = VideoMix(data, root, recipe.run.seed, frame_rate=module.config.frame_rate, progress=progress)
    return VideoTask(module, mix, recipe.run.batch, criterion, recipe.optim)


def _picture_criterion(module: Any, size: int, loss: PictureLossConfig, root: Path) -> Criterion:
    """What pictures, or frames, of ``size`` pixels a side are measured by."""
    adversary = None
    if loss.adversarial:
        least = 3 * 2**loss.adversarial.discriminator.layers
        if size < least:
            raise ConfigError(
                f"loss.adversarial.discriminator.layers: {loss.adversarial.discriminator.layers} want pictures of {least} pixels"
            )
        adversary = Adversary(loss.adversarial, PatchDiscriminator(loss.adversarial.discriminator))
    device = next(module.parameters()).device
    perceptual = build_perceptual(loss.perceptual, root, device) if loss.perceptual else None
    balancer = Balancer(loss.balance, TERMS) if loss.balance else None
    return Criterion(PictureReconstructionLoss(loss, perceptual), loss.quantizer, adversary, balancer).to(device)


def sound_task(module: Any, data: SoundData, loss: SoundLossConfig, recipe: Recipe, root: Path, *, progress: bool) -> TokenizerTask:
    """The task of an audio tokenizer.

    Raises:
        ConfigError: a source is missing or holds no sounds.
    """
    rate, hop = module.config.sample_rate, module.config.downsampling
    adversary = Adversary(loss.adversarial, SpectrogramDiscriminator(loss.adversarial.discriminator)) if loss.adversarial else None
    balancer = Balancer(loss.balance, TERMS) if loss.balance else None
    criterion = Criterion(AudioReconstructionLoss(loss, rate), loss.quantizer, adversary, balancer).to(next(module.parameters()).device)
    mix = SoundMix(data, root, recipe.run.seed, sample_rate=rate, hop=hop, progress=progress)
    return SoundTask(module, mix, recipe.run.batch, criterion, recipe.optim)


@dataclass(frozen=True)
class Medium:
    """What the medium of a tokenizer decides.

    Attributes:
        name: what messages call it.
        data: ``[data]`` of its recipes.
        loss: ``[loss]`` of its recipes.
        task: what makes the task of them.
    """

    name: str
    data: type[Config]
    loss: type[Config]
    task: Callable[..., TokenizerTask]


MEDIA = {
    Modality.IMAGE: Medium("pictures", PictureData, PictureLossConfig, picture_task),
    Modality.VIDEO: Medium("videos", VideoData, PictureLossConfig, video_task),
    Modality.AUDIO: Medium("sounds", SoundData, SoundLossConfig, sound_task),
}


def train_tokenizer(recipe: Recipe, folder: Path, *, data_root: Path, progress: bool = True) -> Path:
    """Trains a tokenizer and saves it in ``folder/result``.

    Args:
        recipe: ``[tokenizer]`` is the configuration, or names in ``start`` a saved tokenizer to go on from. Of pictures, ``[data]`` is
            a :class:`PictureData` and ``[loss]`` a :class:`PictureLossConfig`; of videos, a :class:`VideoData` and the same loss; of
            sounds, a :class:`SoundData` and a :class:`SoundLossConfig`. A vision transformer, which does not reconstruct, is trained
            by :func:`~mmtp.train.semantic_trainer.train_semantic`.
        folder: the run's folder.
        data_root: where relative paths of the sources start.
        progress: whether to show bars.

    Raises:
        ConfigError: a key is unknown (names the nearest), or belongs to another medium, or the tokenizer is none that is trained here.
        TrainError: the run cannot go on.
    """
    torch.manual_seed(recipe.run.seed)
    kind, module = build_or_start(recipe.tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(module, TimmViT):
        return train_semantic(module.to(device), recipe, folder, data_root=data_root, progress=progress)
    if not (hasattr(module, "quantizer") and hasattr(module, "decoder")) or module.spec.modality not in MEDIA:
        raise ConfigError(f"tokenizer.type: {kind!r} has no quantizer and decoder of its own that could be trained here")
    module.to(device)
    medium = MEDIA[module.spec.modality]
    for name, table, given in (("data", medium.data, recipe.data), ("loss", medium.loss, recipe.loss)):
        for other in MEDIA.values():
            strange = given.keys() & (_keys(getattr(other, name)) - _keys(table))
            if strange:
                raise ConfigError(f"{name}.{min(strange)}: is for tokenizers of {other.name}, but {kind!r} is one of {medium.name}")
    data, loss = from_dict(medium.data, recipe.data, "data"), from_dict(medium.loss, recipe.loss, "loss")
    task = medium.task(module, data, loss, recipe, data_root, progress=progress)
    result: Any = Trainer(task, recipe.optim, recipe.run, folder, progress=progress).fit()
    return save_pretrained(result, folder / "result")


def build_or_start(table: dict[str, Any]) -> tuple[str, Any]:
    """What ``[tokenizer]`` names: its type, and a new tokenizer, or a saved one to go on from.

    Args:
        table: a configuration with its ``type``, or ``start`` alone: a folder, a name of the zoo or of the Hub.

    Raises:
        ConfigError: neither, both, or text, which is trained elsewhere.
    """
    if table.get("type") == "text":
        raise ConfigError("tokenizer.type: 'text' is trained by task = 'text'")
    if "start" not in table:
        return table.get("type", ""), build_config("tokenizer", table, "tokenizer").build()
    if strange := table.keys() - {"start"}:
        raise ConfigError(f"tokenizer.{min(strange)}: {table['start']} has its own; give either 'start' or a configuration")
    module = from_pretrained(table["start"])
    return module.config.to_dict()["type"], module


def _keys(table: type[Config]) -> set[str]:
    return {entry.name for entry in fields(table)}  # type: ignore[arg-type]


def _check_balance(config: PictureLossConfig | SoundLossConfig) -> None:
    if config.balance and config.adversarial and config.adversarial.adaptive:
        raise ValueError("balance and adversarial.adaptive both set the adversarial loss's share; choose one")
