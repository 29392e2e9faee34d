"""Continuous picture autoencoders of diffusers: pictures ``[3, h, w]`` in [0, 1] to one vector per cell, and back.

Latents are the model's own, without noise and without scaling; where unit variance is wanted, multiply by
``config.model["scaling_factor"]`` and divide again before ``decode``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.tokenizers.pretrained.base import PretrainedError, Wrapped
from mmtp.tokenizers.pretrained.pictures import from_pixels, to_pixels
from mmtp.tokenizers.reference import Reference
from mmtp.types import Latents, Modality, TokenizerSpec


class PictureAutoencoder(Wrapped):
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
        grids = [self.grid(self._size(i, medium)) for i, medium in enumerate(media)]
        lengths = torch.tensor([h * w for h, w in grids], dtype=torch.long)
        most = max(lengths.tolist(), default=0)
        values = torch.zeros(len(media), most, self._facts.latent_dim)
        coordinates = torch.zeros(len(media), most, 2, dtype=torch.long)
        with Reference(self):
            for i, (medium, grid) in enumerate(zip(media, grids, strict=True)):
                plane = self._latents(to_pixels(self._plain(medium), grid, self._facts.downsampling[0]))
                n = int(lengths[i])
                values[i, :n] = rearrange(plane, "1 d h w -> (h w) d").cpu()
                coordinates[i, :n] = torch.cartesian_prod(*map(torch.arange, grid))
        return Latents(values, coordinates, lengths)

    def decode(self, latents: Latents, sizes: Int[Tensor, "b 2"] | None = None) -> list[Float[Tensor, "c h w"]]:
        """Pictures with values in [0, 1].

        Args:
            latents: as ``encode`` gives them, row by row.
            sizes: height and width to crop each picture to (latents do not carry them); None gives whole cells.

        Raises:
            PretrainedError: latents of another width, or not finite.
        """
        if latents.values.shape[-1] != self._facts.latent_dim:
            raise PretrainedError(f"latents of {latents.values.shape[-1]} numbers given, {self._facts.latent_dim} wanted")
        if not latents.values.isfinite().all():
            raise PretrainedError("latents hold values that are not finite (NaN or infinity)")
        pictures = []
        with Reference(self):
            for values, coordinates, n in zip(latents.values, latents.coordinates, latents.lengths.tolist(), strict=True):
                rows = int(coordinates[:n, 0].amax()) + 1
                plane = self._plain(rearrange(values[:n], "(h w) d -> d h w", h=rows))
                pictures.append(from_pixels(self.model.decode(plane[None]).sample))
        if sizes is None:
            return pictures
        return [p[:, :h, :w] for p, (h, w) in zip(pictures, sizes.tolist(), strict=True)]

    def _latents(self, pixels: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 d rows columns"]:
        raise NotImplementedError


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
