"""Tiny tokenizers that are real (they conform, save and load) and need no training: for tests that must be quick and hermetic."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

import mmtp.config
from mmtp.hub import fingerprint
from mmtp.types import Codes, Modality, TokenizerSpec


class BlockTokenizer(nn.Module):
    """Pictures to the mean colour of square blocks, one codebook per channel, and back to flat blocks.

    Not in the registry: ``REGISTRY.register("tokenizer", "block", "mmtp.testing.fakes:BlockTokenizer")`` puts it there.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(mmtp.config.Config):
        """Sizes.

        Attributes:
            block: pixels per side of a block.
            levels: shades per channel, from 0 to 1; the size of each codebook.
        """

        block: int = 8
        levels: int = 5

    gain: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("gain", torch.ones(3))

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(
            modality=Modality.IMAGE,
            codebook_sizes=(self.config.levels,) * 3,
            downsampling=(self.config.block,) * 2,
            channels=3,
            fingerprint=fingerprint(self.config, self.state_dict()),
        )

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-n // self.config.block) for n in shape)

    def num_tokens(self, shape: Sequence[int]) -> int:
        rows, columns = self.grid(shape)
        return 3 * rows * columns

    def encode(self, media: Sequence[Float[Tensor, "3 _ _"]]) -> Codes:
        return Codes.stack([self._encode(picture) for picture in media])

    def decode(self, codes: Codes) -> list[Float[Tensor, "3 _ _"]]:
        pictures = []
        for i in range(len(codes)):
            shades = codes.item(i) / (self.config.levels - 1)
            picture = repeat(shades, "c r s -> c (r p) (s q)", p=self.config.block, q=self.config.block)
            height, width = picture.shape[1:] if codes.sizes is None else codes.sizes[i].tolist()
            pictures.append(picture[:, :height, :width])
        return pictures

    def _encode(self, picture: Float[Tensor, "3 h w"]) -> Codes:
        block = self.config.block
        height, width = picture.shape[1:]
        padded = F.pad(picture[None], (0, -width % block, 0, -height % block), mode="replicate")[0]
        means = rearrange(padded, "c (r p) (s q) -> c r s (p q)", p=block, q=block).mean(-1)
        ids = (means * self.gain[:, None, None] * (self.config.levels - 1)).round().clamp(0, self.config.levels - 1).long()
        return Codes(ids[None], torch.tensor([ids.shape[1:]]), torch.tensor([[height, width]]))
