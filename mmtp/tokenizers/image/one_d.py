"""Picture tokenizer without a grid: a picture of one size as a short row of codes, of which each stands for the whole picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.tokenizers.image.grid import ImageCodesError, ImageConfig, ImageShapeError, ImageTokenizer
from mmtp.tokenizers.image.transformer import PatchEmbedding, PatchPixels, Transformer, TransformerConfig, plane, tanh_head
from mmtp.tokenizers.quantizers import VQ, QuantizerConfig, refuse_scales
from mmtp.types import Codes


class OneDImageTokenizer(ImageTokenizer):
    """Pictures of one size to ``num_latents`` codes and back (TiTok, Yu et al., arXiv 2406.07550, section 3).

    The encoder reads patches beside learned latent tokens, and only these are quantized; the decoder reads them beside mask tokens, which
    become the patches. To the rest of the library the codes are a picture's grid of one row, ``(1, num_latents)``, in the order of the
    latent tokens. ``spec.downsampling`` shares the picture's width out among them, rounded up, so that ``grid * downsampling`` covers
    the picture, as everywhere; a code's place in the row says nothing of a place in the picture.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ImageConfig):
        """Shape of the networks. The default codebook is TiTok's: unit vectors of 12 numbers.

        Attributes:
            size: (height, width) of pictures in pixels, multiples of ``patch``.
            patch: pixels per side of what the networks read and write as one token.
            num_latents: codes of a picture. A vocabulary's dims must reach as far (``max_dim``, 64 by default).
            encoder: sizes of the encoder.
            decoder: sizes of the decoder.
            quantizer: any registered quantizer's configuration.
        """

        size: tuple[int, int] = (256, 256)
        patch: int = 16
        num_latents: int = 32
        encoder: TransformerConfig = field(default_factory=TransformerConfig)
        decoder: TransformerConfig = field(default_factory=TransformerConfig)
        quantizer: QuantizerConfig = field(default_factory=lambda: VQ.Config(codebook_size=4096, codebook_dim=12))

        def __post_init__(self) -> None:
            if self.patch < 1 or self.num_latents < 1:
                raise ValueError(f"patch {self.patch} and num_latents {self.num_latents} must be at least 1")
            if any(n < 1 or n % self.patch for n in self.size):
                raise ValueError(f"size {list(self.size)}: multiples of patch {self.patch} are wanted")

        @property
        def patches(self) -> tuple[int, int]:
            """Rows and columns of patches."""
            return self.size[0] // self.patch, self.size[1] // self.patch

    def __init__(self, config: Config) -> None:
        cell = (config.size[0], -(-config.size[1] // config.num_latents))
        super().__init__(config, _Encoder(config), _Decoder(config), dim=config.encoder.width, cell=cell)
        refuse_scales(self.quantizer, "a row of tokens, none of which has a place in the picture")

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The one grid there is.

        Raises:
            ImageShapeError: the picture is not of the one size there is.
        """
        if tuple(shape) != self.config.size:
            given, wanted = (f"{height} pixels high and {width} wide" for height, width in (shape, self.config.size))
            raise ImageShapeError(f"{given} given, this tokenizer takes pictures {wanted} only: resize or crop to that")
        return 1, self.config.num_latents

    def extent(self, grid: Sequence[int]) -> tuple[int, int]:
        return self.config.size

    def _check_grids(self, codes: Codes) -> None:
        wanted = [1, self.config.num_latents]
        for i, given in enumerate(codes.lengths.tolist()):
            if given != wanted:
                raise ImageCodesError(f"picture {i}: a grid of {given} codes given, {wanted} is this tokenizer's")


class _Encoder(nn.Module):
    def __init__(self, config: OneDImageTokenizer.Config) -> None:
        super().__init__()
        self.patches = config.patches
        self.embedding = PatchEmbedding(config.patch, config.encoder.width)
        self.latents = nn.Parameter(torch.randn(config.num_latents, config.encoder.width) * 0.02)
        self.transformer = Transformer(config.encoder)
        self.head = tanh_head(config.encoder, config.encoder.width)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d 1 n"]:
        latents = repeat(self.latents, "n d -> b n d", b=len(pixels))
        x = torch.cat((self.embedding(pixels), latents), 1)
        x = self.transformer(x, _positions(self.patches, len(self.latents), pixels.device))
        return rearrange(self.head(x[:, -len(self.latents) :]), "b n d -> b d 1 n")


class _Decoder(nn.Module):
    def __init__(self, config: OneDImageTokenizer.Config) -> None:
        super().__init__()
        self.patches = config.patches
        self.embedding = nn.Linear(config.encoder.width, config.decoder.width)
        # A mask token and its learned position in one: rotary positions alone would tell patches apart only slowly.
        self.masks = nn.Parameter(torch.randn(config.patches[0] * config.patches[1], config.decoder.width) * 0.02)
        self.transformer = Transformer(config.decoder)
        self.pixels = PatchPixels(config.decoder, config.patch)

    def forward(self, latents: Float[Tensor, "b d 1 n"]) -> Float[Tensor, "b 3 h w"]:
        masks = repeat(self.masks, "s d -> b s d", b=len(latents))
        x = torch.cat((masks, self.embedding(rearrange(latents, "b d 1 n -> b n d"))), 1)
        x = self.transformer(x, _positions(self.patches, latents.shape[3], latents.device))
        return self.pixels(x[:, : len(self.masks)], self.patches[0])


def _positions(patches: tuple[int, int], latents: int, device: torch.device) -> Int[Tensor, "s 3"]:
    """Those of patches, then those of latent tokens: along the axis of time, which a picture does not use."""
    row = torch.zeros(latents, 3, dtype=torch.long, device=device)
    row[:, 0] = torch.arange(1, latents + 1, device=device)
    return torch.cat((plane(*patches, device), row))
