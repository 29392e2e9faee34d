"""Picture tokenizer of two vision transformers: encoder, quantizer, decoder. Any height and width."""

from dataclasses import dataclass, field

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.tokenizers.image.grid import ImageConfig, ImageTokenizer
from mmtp.tokenizers.image.tiling import Tiling
from mmtp.tokenizers.image.transformer import PatchEmbedding, PatchPixels, Transformer, TransformerConfig, plane, tanh_head
from mmtp.tokenizers.quantizers import VQ, QuantizerConfig


class ViTImageTokenizer(ImageTokenizer):
    """Pictures to a grid of codes and back, by transformers over patches (ViT-VQGAN, Yu et al., arXiv 2110.04627, section 3).

    Every code depends on the whole picture. Blocks are those of :mod:`mmtp.nn.block` with rotary positions of rows and columns in place
    of learned ones, so that there is no size of picture that they were made for; still, codes are best near the sizes of training.
    Larger pictures are taken in tiles of such a size, whose latents (and pixels) fade into each other where tiles overlap.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ImageConfig):
        """Shape of the networks. The defaults are ViT-VQGAN's: small encoder and decoder, unit vectors of 32 numbers as codebook.

        Attributes:
            patch: pixels per side of a cell of codes.
            tile: pixels per side of a tile; pictures of more than ``tile * tile`` pixels are taken in tiles. A multiple of ``patch``.
                Tiles overlap by a quarter of it.
            encoder: sizes of the encoder.
            decoder: sizes of the decoder.
            quantizer: any registered quantizer's configuration.
        """

        patch: int = 8
        tile: int = 512
        encoder: TransformerConfig = field(default_factory=TransformerConfig)
        decoder: TransformerConfig = field(default_factory=TransformerConfig)
        quantizer: QuantizerConfig = field(default_factory=lambda: VQ.Config(codebook_size=8192, codebook_dim=32))

        def __post_init__(self) -> None:
            if self.patch < 1:
                raise ValueError(f"patch {self.patch}: at least 1 is wanted")
            if self.tile < self.patch or self.tile % self.patch:
                raise ValueError(f"tile {self.tile}: a multiple of patch {self.patch} is wanted")

    def __init__(self, config: Config) -> None:
        super().__init__(config, _Encoder(config), _Decoder(config), dim=config.encoder.width, cell=(config.patch, config.patch))

    @property
    def tiling(self) -> Tiling:
        side = self.config.tile // self.config.patch
        return Tiling(side=side, encoder_overlap=side // 4, decoder_overlap=side // 4, blend=True)


class _Encoder(nn.Module):
    def __init__(self, config: ViTImageTokenizer.Config) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(config.patch, config.encoder.width)
        self.transformer = Transformer(config.encoder)
        self.head = tanh_head(config.encoder, config.encoder.width)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d rows columns"]:
        rows, columns = (n // self.embedding.patch for n in pixels.shape[2:])
        x = self.transformer(self.embedding(pixels), plane(rows, columns, pixels.device))
        return rearrange(self.head(x), "b (h w) d -> b d h w", h=rows)


class _Decoder(nn.Module):
    def __init__(self, config: ViTImageTokenizer.Config) -> None:
        super().__init__()
        self.embedding = nn.Linear(config.encoder.width, config.decoder.width)
        self.transformer = Transformer(config.decoder)
        self.pixels = PatchPixels(config.decoder, config.patch)

    def forward(self, latents: Float[Tensor, "b d rows columns"]) -> Float[Tensor, "b 3 h w"]:
        rows, columns = latents.shape[2:]
        x = self.embedding(rearrange(latents, "b d h w -> b (h w) d"))
        return self.pixels(self.transformer(x, plane(rows, columns, latents.device)), rows)
