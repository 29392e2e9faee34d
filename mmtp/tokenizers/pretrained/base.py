"""What the adapters share: building and loading another library's model, and running it one medium at a time.

One at a time, because these encoders do not mask padding (Mimi, EnCodec) and because float32 sums depend on the shape of a batch: so the
codes of a medium cannot depend on what else is in the list. It costs speed on an accelerator, not correctness anywhere.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.config import Config as BaseConfig
from mmtp.tokenizers.reference import FingerprintCache, Reference, fault
from mmtp.types import Codes, MmtpError, Modality, TokenizerSpec

W = TypeVar("W", bound="Wrapped")


class PretrainedError(MmtpError):
    """A model that cannot be wrapped, or a medium that it cannot take."""


class Wrapped(nn.Module, ABC):
    """A model of another library, which a subclass brings under our contract.

    Subclasses name the library and the class, and describe the model in ``_describe``.

    Args:
        config: what the model is built from.
        model: an instance that is at hand already (it is taken over and made float32); None builds one with random weights.

    Raises:
        PretrainedError: the library is not installed, or the model is of a kind that the contract has no room for.
    """

    package: ClassVar[Literal["transformers", "diffusers"]]
    model_class: ClassVar[str]

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """What is needed to build the wrapped model again.

        Attributes:
            model: its own configuration, as its library writes it, without names, versions and data types.
        """

        model: dict[str, Any]

    def __init__(self, config: Config, model: Any = None) -> None:
        super().__init__()
        self.config: Any = config
        self.model: Any = (self._build() if model is None else model).float()
        self._facts = self._describe()
        self._fingerprint = FingerprintCache()

    @classmethod
    def from_pretrained_model(cls: type[W], source: str | Path, *, subfolder: str = "", **fields: Any) -> W:
        """Loads the folder or Hub repository in which the other library saved the model.

        Args:
            source: a local folder or a Hub id.
            subfolder: where in it the model lies (``"vae"`` in repositories of diffusion pipelines).
            fields: our own fields of ``Config`` (``num_codebooks``).

        Raises:
            PretrainedError: there is no such model there, or some of its weights are missing (the library would leave them random).
        """
        where = {"subfolder": subfolder} if subfolder else {}
        theirs = cls._theirs()
        try:
            model, info = theirs.from_pretrained(str(source), output_loading_info=True, **where)
        except Exception as error:  # what the libraries raise depends on what is wrong in which file
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise PretrainedError(f"{source}: cannot be loaded as {cls.model_class} ({reason})") from error
        if missing := sorted(info["missing_keys"]):
            raise PretrainedError(f"{source}: is not a saved {cls.model_class}: {len(missing)} weights are missing, such as {missing[0]}")
        return cls.wrap(model, **fields)

    @classmethod
    def wrap(cls: type[W], model: nn.Module, **fields: Any) -> W:
        """The tokenizer around a model at hand, such as the ``vqmodel`` of a larger one.

        Args:
            model: an instance of the library's class; it is taken over, made float32 and set to evaluation mode.
            fields: our own fields of ``Config``.

        Raises:
            PretrainedError: the model is of another class, or of a kind that the contract has no room for.
        """
        if type(model).__name__ != cls.model_class:
            raise PretrainedError(f"{cls.__name__} wraps {cls.package}.{cls.model_class}, not {type(model).__name__}")
        return cls.Config(model=cls._settings(model), **fields).build(model=model).eval()

    @property
    def spec(self) -> TokenizerSpec:
        return replace(self._facts, fingerprint=self._fingerprint.of(self.config, self))

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-n // cell) for n, cell in zip(shape, self._facts.downsampling, strict=True))

    def num_tokens(self, shape: Sequence[int]) -> int:
        return math.prod(self.grid(shape)) * max(1, self._facts.num_codebooks)

    @abstractmethod
    def _describe(self) -> TokenizerSpec:
        """The spec, all but the fingerprint."""

    @classmethod
    def _theirs(cls) -> Any:
        try:
            return getattr(import_module(cls.package), cls.model_class)
        except ImportError as error:
            raise PretrainedError(f"{cls.__name__} needs {cls.package}, which is an extra: pip install 'mmtp[hf]'") from error

    @classmethod
    def _settings(cls, model: Any) -> dict[str, Any]:
        """A model's own configuration in plain values; what says nothing of codes (names, versions, data types) is left out."""
        if cls.package == "transformers":
            common = import_module(cls.package).PreTrainedConfig().to_dict()
            values = {k: v for k, v in model.config.to_dict().items() if k not in common}
        else:
            values = {k: v for k, v in model.config.items() if not k.startswith("_")}
        return json.loads(json.dumps(values))

    def _build(self) -> Any:
        theirs = self._theirs()
        return theirs(theirs.config_class(**self.config.model)) if self.package == "transformers" else theirs(**self.config.model)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _size(self, index: int, medium: Tensor) -> tuple[int, ...]:
        """Extent of a medium that can be encoded.

        Raises:
            PretrainedError: it has another shape than wanted, is empty, or holds a value that is not finite.
        """
        axes = {Modality.AUDIO: "samples", Modality.IMAGE: "height, width", Modality.VIDEO: "frames, height, width"}[self._facts.modality]
        channels = self._facts.channels
        fits = medium.ndim == 1 + len(self._facts.downsampling) and medium.shape[0] == channels and 0 not in medium.shape
        if not (fits and medium.is_floating_point()):
            raise PretrainedError(f"medium {index}: {medium.dtype} {list(medium.shape)} given, floats [{channels}, {axes}] wanted")
        if not medium.float().isfinite().all():
            raise PretrainedError(f"medium {index}: holds values that are not finite (NaN or infinity)")
        return tuple(medium.shape[1:])

    def _plain(self, medium: Float[Tensor, "c *size"]) -> Float[Tensor, "c *size"]:
        """A medium in float32 on the model's device, in plain memory order: convolutions round otherwise in another order."""
        return medium.to(self._device, torch.float32).contiguous()


class WrappedQuantizer(Wrapped):
    """Discrete tokenizers: subclasses say in ``_ids`` and ``_medium`` how their model is called."""

    def encode(self, media: Sequence[Tensor]) -> Codes:
        """Codes of pictures or videos ``[3, *size]`` in [0, 1] or sounds ``[c, t]`` in [-1, 1], in evaluation mode and float32.

        Raises:
            PretrainedError: a medium is of another shape, empty or not finite; names which.
        """
        sizes = [self._size(i, medium) for i, medium in enumerate(media)]
        grids = [self.grid(size) for size in sizes]
        axes = len(self._facts.downsampling)
        whole = [max((g[axis] for g in grids), default=0) for axis in range(axes)]
        ids = torch.zeros((len(media), self._facts.num_codebooks, *whole), dtype=torch.long)
        with Reference(self):
            for i, (medium, grid) in enumerate(zip(media, grids, strict=True)):
                found = self._ids(self._plain(medium), grid)
                if found.shape[1:].numel() != math.prod(grid):
                    raise PretrainedError(f"medium {i}: {self.model_class} gives {list(found.shape)} codes where the grid is {list(grid)}")
                ids[(i, slice(None), *map(slice, grid))] = found.reshape(-1, *grid).cpu()
        return Codes(ids, _table(grids, axes), _table(sizes, axes))

    def decode(self, codes: Codes) -> list[Float[Tensor, "c *size"]]:
        """Media with values in ``spec.value_range``, cropped to ``codes.sizes`` where these are given, else of whole cells.

        Raises:
            PretrainedError: more codebooks than this tokenizer has, or a code outside its codebook.
        """
        if message := fault(codes.ids.transpose(0, 1), self._facts.codebook_sizes):
            raise PretrainedError(message)
        least, most = self._facts.value_range
        with Reference(self):
            media = [self._medium(codes.item(i).to(self._device)).clamp(least, most) for i in range(len(codes))]
        if codes.sizes is None:
            return media
        return [m[(slice(None), *map(slice, size))] for m, size in zip(media, codes.sizes.tolist(), strict=True)]

    @abstractmethod
    def _ids(self, medium: Float[Tensor, "c *size"], grid: tuple[int, ...]) -> Int[Tensor, "k *cells"]:
        """Codes of one medium, flat or as a grid."""

    @abstractmethod
    def _medium(self, ids: Int[Tensor, "k *grid"]) -> Float[Tensor, "c *size"]:
        """The medium of one item's codes, in whole cells."""


def _table(rows: Sequence[Sequence[int]], axes: int) -> Int[Tensor, "b axes"]:
    return torch.tensor(rows, dtype=torch.long).reshape(-1, axes)
