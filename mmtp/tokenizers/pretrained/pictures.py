"""Picture quantizers of transformers and diffusers. Pictures ``[3, h, w]`` in [0, 1] to one codebook's grid ``[1, rows, columns]``.

Pictures are padded by repeating their border to whole cells and cropped again by ``decode``; nothing is ever resized. The models see
values in [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.tokenizers.base import EncodeOnlyError
from mmtp.tokenizers.pretrained.base import PretrainedError, WrappedQuantizer
from mmtp.tokenizers.pretrained.quick import QuickQuantizer
from mmtp.types import Codes, Modality, TokenizerSpec


class PictureQuantizer(WrappedQuantizer):
    """What the picture quantizers share; subclasses say what their configurations call widths and codebook."""

    widths_key: ClassVar[str] = "channel_multiplier"
    codebook_key: ClassVar[str] = "num_embeddings"

    def _describe(self) -> TokenizerSpec:
        theirs = self.model.config
        return TokenizerSpec(
            modality=Modality.IMAGE,
            codebook_sizes=(getattr(theirs, self.codebook_key),),
            # Every width but the last halves the grid.
            downsampling=(2 ** (len(getattr(theirs, self.widths_key)) - 1),) * 2,
            channels=theirs.in_channels,
        )

    def _ids(self, medium: Float[Tensor, "c h w"], grid: tuple[int, ...]) -> Int[Tensor, "1 *cells"]:
        return self._indices(to_pixels(medium, grid, self._facts.downsampling[0])).reshape(1, -1)

    def _medium(self, ids: Int[Tensor, "1 rows columns"]) -> Float[Tensor, "c h w"]:
        return from_pixels(self._pixels(ids))

    def _indices(self, pixels: Float[Tensor, "1 c h w"]) -> Int[Tensor, "..."]:
        """Codes of pixels in [-1, 1], in reading order."""
        return self.model.encode(pixels).image_tokens

    def _pixels(self, ids: Int[Tensor, "1 rows columns"]) -> Float[Tensor, "1 c h w"]:
        """Pixels of codes, about [-1, 1]; what has no decoder keeps this."""
        raise EncodeOnlyError(f"{type(self).__name__} has no decoder: it makes codes only")


class JanusVQ(QuickQuantizer, PictureQuantizer):
    """The quantizer of Janus (Wu et al. 2024, arXiv:2410.13848) as ``transformers.JanusVQVAE``; LlamaGen's VQ-16 by layout.

    Its decoder knows one grid, ``num_patches`` squared, so only pictures that fill it are encoded: resize them first.
    """

    package = "transformers"
    model_class = "JanusVQVAE"

    @dataclass(frozen=True, kw_only=True)
    class Config(PictureQuantizer.Config):
        """Configuration of :class:`JanusVQ`."""

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Grid of a picture ``(height, width)``.

        Raises:
            PretrainedError: the picture does not fill the model's one grid.
        """
        grid, side = super().grid(shape), self.model.config.num_patches
        if grid != (side, side):
            pixels = side * self._facts.downsampling[0]
            has = f"a picture of {'x'.join(map(str, shape))} pixels has {grid[0]}x{grid[1]} cells"
            raise PretrainedError(f"{has}, this JanusVQVAE only {side}x{side}: resize to {pixels}x{pixels}")
        return grid

    def _indices(self, pixels: Float[Tensor, "1 c h w"]) -> Int[Tensor, " cells"]:
        return self.model.quantize(self.model.quant_conv(self.run("encoder", pixels)))[2]

    def _pixels(self, ids: Int[Tensor, "1 rows columns"]) -> Float[Tensor, "1 c h w"]:
        return self.run("decoder", self.model.post_quant_conv(self.model.quantize.get_codebook_entry(ids.flatten(1))))


class Emu3VQ(PictureQuantizer):
    """The quantizer of Emu3 (Wang et al. 2024, arXiv:2409.18869) as ``transformers.Emu3VQVAE``, for single pictures."""

    package = "transformers"
    model_class = "Emu3VQVAE"
    codebook_key = "codebook_size"

    @dataclass(frozen=True, kw_only=True)
    class Config(PictureQuantizer.Config):
        """Configuration of :class:`Emu3VQ`."""

    def _indices(self, pixels: Float[Tensor, "1 c h w"]) -> Int[Tensor, "rows columns"]:
        return self.model.encode(pixels, image_sizes=[pixels.shape[2:]]).image_tokens[0]

    def _pixels(self, ids: Int[Tensor, "1 rows columns"]) -> Float[Tensor, "1 c h w"]:
        return self.model.decode(ids)


class ChameleonVQ(PictureQuantizer):
    """The quantizer of Chameleon (2024, arXiv:2405.09818) as ``transformers.ChameleonVQVAE``, which has no decoder: codes only."""

    package = "transformers"
    model_class = "ChameleonVQVAE"

    @dataclass(frozen=True, kw_only=True)
    class Config(PictureQuantizer.Config):
        """Configuration of :class:`ChameleonVQ`."""

    def decode(self, codes: Codes) -> NoReturn:
        """There is no way back.

        Raises:
            EncodeOnlyError: always.
        """
        raise EncodeOnlyError("ChameleonVQVAE has no decoder in transformers: it makes codes only")


class DiffusersVQ(PictureQuantizer):
    """VQ-GAN (Esser et al. 2021, arXiv:2012.09841) as ``diffusers.VQModel``."""

    package = "diffusers"
    model_class = "VQModel"
    widths_key = "block_out_channels"
    codebook_key = "num_vq_embeddings"

    @dataclass(frozen=True, kw_only=True)
    class Config(PictureQuantizer.Config):
        """Configuration of :class:`DiffusersVQ`."""

    def __init__(self, config: Config, model: Any = None) -> None:
        super().__init__(config, model)
        self.model.register_to_config(lookup_from_codebook=True)  # without it, decode takes vectors only

    def _indices(self, pixels: Float[Tensor, "1 c h w"]) -> Int[Tensor, " cells"]:
        _, _, (_, _, ids) = self.model.quantize(self.model.encode(pixels).latents)
        return ids

    def _pixels(self, ids: Int[Tensor, "1 rows columns"]) -> Float[Tensor, "1 c h w"]:
        return self.model.decode(ids.flatten(), force_not_quantize=True, shape=(*ids.shape, -1)).sample


def to_pixels(picture: Float[Tensor, "c h w"], grid: tuple[int, ...], cell: int) -> Float[Tensor, "1 c h2 w2"]:
    """A picture in [0, 1] as the models see it: in [-1, 1], its border repeated to whole cells."""
    amounts = (0, grid[1] * cell - picture.shape[2], 0, grid[0] * cell - picture.shape[1])
    return F.pad(picture[None] * 2 - 1, amounts, mode="replicate")


def from_pixels(pixels: Float[Tensor, "1 c h w"]) -> Float[Tensor, "c h w"]:
    """The picture in [0, 1] of pixels about [-1, 1]."""
    return torch.clamp((pixels[0] + 1) / 2, 0, 1)
