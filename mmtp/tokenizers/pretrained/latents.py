"""Continuous picture autoencoders of diffusers: pictures ``[3, h, w]`` in [0, 1] to one vector per cell, and back.

Latents are the model's own, without noise and without scaling; where unit variance is wanted, multiply by
``config.model["scaling_factor"]`` and divide again before ``decode``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mmtp.tokenizers.continuous.base import plane
from mmtp.tokenizers.pretrained.base import Wrapped
from mmtp.tokenizers.pretrained.pictures import from_pixels, to_pixels
from mmtp.tokenizers.reference import Reference
from mmtp.types import Latents, Modality, TokenizerSpec, grid_coordinates


class PictureAutoencoder(Wrapped, ABC):
    """What the autoencoders share; subclasses say in ``_latents`` what their encoder's answer is called."""

    package = "diffusers"
    widths_key: ClassVar[str]

    def _describe(self) -> TokenizerSpec:
        theirs = self.model.config
        return TokenizerSpec(
            modality=Modality.IMAGE,
            # Every width but the last halves the grid.
            downsampling=(2 ** (len(theirs[self.widths_key]) - 1),) * 2,
            channels=theirs.in_channels,
            latent_dim=theirs.latent_channels,
        )

    def encode(self, media: Sequence[Tensor]) -> Latents:
        """Latents of pictures ``[3, h, w]`` in [0, 1], row by row, in evaluation mode and float32.

        Pictures are padded by repeating their border to whole cells.

        Raises:
            PretrainedError: a picture is of another shape, empty or not finite; names which.
        """
        sizes = [self._size(i, medium) for i, medium in enumerate(media)]
        if not sizes:
            table = torch.zeros(0, 0, 2, dtype=torch.long)
            return Latents(torch.zeros(0, 0, self._facts.latent_dim), table, table.new_zeros(0))
        grids = [self.grid(size) for size in sizes]
        values = []
        with Reference(self):
            for medium, grid in zip(media, grids, strict=True):
                found = self._latents(to_pixels(self._plain(medium), grid, self._facts.downsampling[0]))
                values.append(rearrange(found, "1 d h w -> (h w) d").cpu())
        return Latents.pad(values, [grid_coordinates(grid) for grid in grids], sizes)

    def decode(self, latents: Latents) -> list[Float[Tensor, "c h w"]]:
        """Pictures with values in [0, 1], cropped to ``latents.sizes`` where these are given, else of whole cells.

        Raises:
            LatentsError: latents of another width, not finite, or not one for each cell of a grid.
        """
        planes = [plane(latents, i, self._facts.latent_dim) for i in range(len(latents))]
        with Reference(self):
            pictures = [from_pixels(self.model.decode(self._plain(p)[None]).sample) for p in planes]
        if latents.sizes is None:
            return pictures
        return [p[:, :h, :w] for p, (h, w) in zip(pictures, latents.sizes.tolist(), strict=True)]

    @abstractmethod
    def _latents(self, pixels: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 d rows columns"]: ...


class AutoencoderKL(PictureAutoencoder):
    """The autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752) as ``diffusers.AutoencoderKL``.

    Latents are the mode of its posterior: no noise is drawn, so that a picture has one encoding.
    """

    model_class = "AutoencoderKL"
    widths_key = "block_out_channels"

    @dataclass(frozen=True, kw_only=True)
    class Config(PictureAutoencoder.Config):
        """Configuration of :class:`AutoencoderKL`."""

    def _latents(self, pixels: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 d rows columns"]:
        return self.model.encode(pixels).latent_dist.mode()


class AutoencoderDC(PictureAutoencoder):
    """The deep-compression autoencoder (Chen et al. 2024, arXiv:2410.10733) as ``diffusers.AutoencoderDC``."""

    model_class = "AutoencoderDC"
    widths_key = "encoder_block_out_channels"

    @dataclass(frozen=True, kw_only=True)
    class Config(PictureAutoencoder.Config):
        """Configuration of :class:`AutoencoderDC`."""

    def _latents(self, pixels: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 d rows columns"]:
        return self.model.encode(pixels).latent
