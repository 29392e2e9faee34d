"""Vision transformers of timm: pictures of any size to one vector per patch."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.data.naflex_transforms import get_image_size_for_seq, patchify_image
from timm.models import load_model_config_from_hf
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import mmtp.config
from mmtp.config import ConfigError, load_file
from mmtp.tokenizers.continuous.base import FeatureTokenizer
from mmtp.tokenizers.image.grid import picture_size
from mmtp.tokenizers.pretrained.base import PretrainedError
from mmtp.types import Latents, Modality, TokenizerSpec, grid_coordinates

OWN = ("checkpoint_path", "dynamic_img_size", "in_chans", "num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
"""Arguments of ``timm.create_model`` that are not for a configuration to set."""


class TimmViT(FeatureTokenizer):
    """Pictures ``[3, h, w]`` in [0, 1] to the patch tokens of a vision transformer of timm.

    Any size is taken at its own proportions: position embeddings are interpolated to the grid of patches (Dosovitskiy et al. 2021, arXiv
    2010.11929, section 3.2). A picture of more than ``max_patches`` patches is first scaled down until it has no more, proportions kept to
    the nearest patch, as in NaFlex (Tschannen et al. 2025, arXiv 2502.14786, section 2.4.2). Others are padded to whole patches by
    repeating their border. Pixels are normalised by ``mean`` and ``std`` inside.

    Layers above ``layer`` and the classifier are dropped when the model is built, so a saved folder holds what is used and no more.

    Args:
        config: what the model is built from, with new weights.
        model: an instance of timm's class that is at hand already; it is taken over and cut down to ``config.layer``.

    Raises:
        ConfigError: timm has no such model, it does not take these options, or it is no vision transformer.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(mmtp.config.Config):
        """What is needed to build the model again.

        Attributes:
            model: timm's name of the architecture, without the tag of its weights (``naflexvit_base_patch16_gap``).
            options: arguments of timm's class (``embed_dim``, ``depth``, ``num_heads``, ``patch_size``, ``img_size``, ``reg_tokens``, …).
            layer: block whose output is given; negative ones count from the last.
            norm: whether the model's final norm is applied. Models made for average pooling have none.
            prefix: whether the class token and registers are given too, before the patches, at coordinates -1.
            max_patches: most patches of a picture; larger pictures are scaled down. None scales none.
            mean: of each channel, subtracted from values in [0, 1].
            std: of each channel, by which the rest is divided.
        """

        model: str
        options: dict[str, Any] = field(default_factory=dict)
        layer: int = -1
        norm: bool = True
        prefix: bool = False
        max_patches: int | None = 4096
        mean: tuple[float, float, float] = IMAGENET_INCEPTION_MEAN
        std: tuple[float, float, float] = IMAGENET_INCEPTION_STD

        def __post_init__(self) -> None:
            if self.max_patches is not None and self.max_patches < 1:
                raise ValueError(f"max_patches {self.max_patches}: at least 1 is wanted")
            if min(self.std) <= 0:
                raise ValueError(f"std {self.std}: numbers above 0 are wanted")
            if own := sorted(set(self.options) & set(OWN)):
                raise ValueError(f"options.{own[0]}: is set by TimmViT itself; leave it out")

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, model: Any = None) -> None:
        super().__init__(config)
        self.model: Any = _create(config.model, config.options) if model is None else model.float()
        depth = len(self.model.blocks)
        if not -depth <= config.layer < depth:
            raise ConfigError(f"layer {config.layer}: {config.model} has {depth} layers, {-depth} to {depth - 1} are wanted")
        # What is left ends with the wanted layer, so that its plain forward pass gives the features.
        self.model.prune_intermediate_layers([config.layer % depth], prune_norm=not config.norm, prune_head=True)
        embedding: Any = self.model.embeds if isinstance(self.model, NaFlexVit) else self.model.patch_embed
        height, width = embedding.feat_ratio(as_scalar=False)
        self.patch = (int(height), int(width))
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained_model(
        cls, source: str | Path, *, weights: str | Path | None = None, options: Mapping[str, Any] | None = None, **fields: Any
    ) -> "TimmViT":
        """Loads weights of timm; ``save_pretrained`` writes them as a folder of ours, which needs no Hub.

        Args:
            source: a folder that timm saved (``config.json`` and weights), a Hub id ``owner/name``, or timm's name of a model with its tag
                (``vit_small_patch14_dinov2.lvd142m``), whose weights come from the Hub.
            weights: a file of weights (safetensors or a checkpoint of timm) for a model named in ``source``.
            options: arguments of timm's class, besides those that a saved folder names.
            fields: other fields of ``Config`` (``layer``, ``max_patches``); mean and standard deviation are those of the weights.

        Raises:
            PretrainedError: there is no such model there, or some of its weights are missing.
        """
        try:
            name, architecture, theirs = _locate(source)
            chosen = {key: value for key, value in (theirs | dict(options or {})).items() if key not in OWN}
            how = {} if weights is None else {"pretrained_cfg_overlay": {"file": str(weights)}}
            model = _create(architecture, chosen, name, **how)
        except Exception as error:  # what is raised depends on what is wrong in which file
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise PretrainedError(f"{weights or source}: cannot be loaded by timm ({reason})") from error
        facts = model.pretrained_cfg
        values: dict[str, Any] = {"mean": tuple(facts["mean"]), "std": tuple(facts["std"])} | fields
        config = cls.Config(model=architecture, options=json.loads(json.dumps(chosen)), **values)
        return config.build(model=model).eval()

    @property
    def num_prefix(self) -> int:
        """Class token and registers of the model, whether they are given or not."""
        return self.model.num_prefix_tokens

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(n // p for n, p in zip(self._frame(shape)[0], self.patch, strict=True))

    def num_tokens(self, shape: Sequence[int]) -> int:
        return super().num_tokens(shape) + (self.num_prefix if self.config.prefix else 0)

    def forward(self, pictures: Sequence[Float[Tensor, "3 _ _"]] | Float[Tensor, "b 3 h w"]) -> Latents:
        """Latents of pictures in [0, 1], in the mode that the module is in: what training calls.

        Pictures of one grid pass together. Of different ones, NaFlex models take all at once, padding masked; others take grid by grid.
        """
        pixels = [self._pixels(picture) for picture in pictures]
        grids = [(p.shape[1] // self.patch[0], p.shape[2] // self.patch[1]) for p in pixels]
        ragged = isinstance(self.model, NaFlexVit) and self.model.embeds.is_linear and len(set(grids)) > 1
        values = self._ragged(pixels) if ragged else self._by_grid(pixels, grids)
        first = 0 if self.config.prefix else self.num_prefix
        coordinates = [self._places(grid).to(values[0].device) for grid in grids]
        return Latents.pad([v[first:] for v in values], coordinates, [tuple(p.shape[1:]) for p in pictures])

    def _describe(self) -> TokenizerSpec:
        return TokenizerSpec(modality=Modality.IMAGE, downsampling=self.patch, channels=3, latent_dim=self.model.num_features)

    def _size(self, medium: Tensor, index: int) -> tuple[int, ...]:
        return picture_size(medium, f"picture {index}")

    def _features(self, medium: Float[Tensor, "3 h w"]) -> Float[Tensor, "n d"]:
        return self([medium]).values[0]

    def _coordinates(self, size: Sequence[int]) -> Int[Tensor, "n 2"]:
        return self._places(self.grid(size))

    def _places(self, grid: Sequence[int]) -> Int[Tensor, "n 2"]:
        prefix = torch.full((self.num_prefix if self.config.prefix else 0, 2), -1)
        return torch.cat([prefix, grid_coordinates(grid)])

    def _frame(self, shape: Sequence[int]) -> tuple[tuple[int, int], bool]:
        """Height and width in whole patches that a picture gets, and whether it is scaled (else padded) to them."""
        (height, width), (p, q) = shape, self.patch
        whole = -(-height // p) * p, -(-width // q) * q
        budget = self.config.max_patches
        if budget is None or (whole[0] // p) * (whole[1] // q) <= budget:
            return whole, False
        _, scaled = get_image_size_for_seq((height, width), self.patch, budget, max_ratio=1.0)
        return scaled, True

    def _pixels(self, picture: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 h2 w2"]:
        """A picture as the model sees it: of whole patches, normalised."""
        (height, width), scaled = self._frame(picture.shape[1:])
        pixels = picture[None].to(self.mean.device, torch.float32)
        if scaled:
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        else:
            pixels = F.pad(pixels, (0, width - pixels.shape[3], 0, height - pixels.shape[2]), mode="replicate")
        return (pixels[0] - self.mean) / self.std

    def _by_grid(self, pixels: Sequence[Float[Tensor, "3 _ _"]], grids: Sequence[tuple[int, int]]) -> list[Float[Tensor, "_ d"]]:
        out: dict[int, Tensor] = {}
        for grid in set(grids):
            members = [i for i, other in enumerate(grids) if other == grid]
            out |= dict(zip(members, self.model.forward_features(torch.stack([pixels[i] for i in members])), strict=True))
        return [out[i] for i in range(len(grids))]

    def _ragged(self, pixels: Sequence[Float[Tensor, "3 _ _"]]) -> list[Float[Tensor, "_ d"]]:
        parts = [patchify_image(p, self.patch, channels_last=self.model.embeds.channels_last) for p in pixels]
        lengths = [len(patches) for patches, _, _ in parts]
        patches, coordinates, valid = (torch.nn.utils.rnn.pad_sequence(list(x), batch_first=True) for x in zip(*parts, strict=True))
        device = patches.device
        found = self.model.forward_features(patches, coordinates.to(device), valid.to(device))["patches"]
        return [tokens[: self.num_prefix + n] for tokens, n in zip(found, lengths, strict=True)]


def _create(architecture: str, options: Mapping[str, Any], source: str | None = None, **how: Any) -> Any:
    """A model of timm that takes pictures of any size; with the weights of ``source`` where one is named.

    Raises:
        ConfigError: there is none of this name, with these options, or it is not a vision transformer.
    """
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        raise ConfigError(f"model {architecture!r}: timm has none of this name{f'; did you mean {near[0]!r}?' if near else ''}")
    # NaFlex models take any grid as they are. Weights are loaded with the classifier that they were saved with: where the number of
    # classes is another, timm does not mind weights that are missing.
    arguments: dict[str, Any] = {"num_classes": 0} if source is None else {"pretrained": True, **how}
    if not architecture.startswith("naflexvit"):
        arguments["dynamic_img_size"] = True
    try:
        model = timm.create_model(source or architecture, **arguments, **options)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"model {architecture!r}: does not take these options ({error})") from error
    if not isinstance(model, VisionTransformer | Eva | NaFlexVit):
        raise ConfigError(f"model {architecture!r}: is a {type(model).__name__}; a vision transformer is wanted")
    return model


def _locate(source: str | Path) -> tuple[str, str, dict[str, Any]]:
    """What timm calls a source, the architecture there, and the arguments that it was made with."""
    if Path(source).is_dir():
        saved = load_file(Path(source) / "config.json")
        return f"local-dir:{source}", saved["architecture"], saved.get("model_args") or {}
    if "/" in str(source):
        _, architecture, options = load_model_config_from_hf(str(source))
        return f"hf-hub:{source}", architecture, options or {}
    return str(source), str(source).partition(".")[0], {}
