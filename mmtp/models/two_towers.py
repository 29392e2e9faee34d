"""Two towers: features of a picture and a caption to vectors of one space, so that one can be found by the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.config import Config as BaseConfig
from mmtp.hub import from_pretrained
from mmtp.nn.block import Block, init_weights
from mmtp.nn.norm import RMSNorm
from mmtp.nn.rope import Rope

HEAD_DIM = 32
"""Width of a head of the text tower."""

ROPE_THETA = 100.0
"""Base of the rotary frequencies: captions are some dozens of tokens long."""


class TwoTowers(nn.Module):
    """A projection of a picture tokenizer's features, and a small bidirectional transformer over a caption's tokens.

    Both end as unit vectors: the mean of a picture's patches or of a caption's tokens, normalised and projected.

    Args:
        config: sizes, and which text tokenizer.

    Raises:
        HubError: there is no such text tokenizer.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """Sizes.

        Attributes:
            text: text tokenizer, a zoo entry or folder.
            picture_width: of the picture tokenizer's features.
            width: of the text tower; a multiple of 32.
            depth: blocks of the text tower.
            dim: of the common space.
            length: most tokens of a caption; the rest is cut off.
        """

        text: str
        picture_width: int
        width: int = 128
        depth: int = 4
        dim: int = 128
        length: int = 32

        def __post_init__(self) -> None:
            if self.width < HEAD_DIM or self.width % HEAD_DIM:
                raise ValueError(f"width {self.width}: a multiple of {HEAD_DIM} is wanted")
            if min(self.picture_width, self.depth, self.dim, self.length) < 1:
                raise ValueError("picture_width, depth, dim and length: at least 1 is wanted")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        # No submodule: its file is its own, and a folder names it.
        self._tokenizer = (from_pretrained(config.text),)
        heads = config.width // HEAD_DIM
        self.embedding = nn.Embedding(self._tokenizer[0].spec.codebook_sizes[0], config.width)
        self.rope = Rope(HEAD_DIM, ROPE_THETA)
        self.blocks = nn.ModuleList(Block(config.width, heads, heads, HEAD_DIM, 8 * config.width // 3) for _ in range(config.depth))
        self.text_norm, self.picture_norm = RMSNorm(config.width), nn.LayerNorm(config.picture_width)
        self.text_out = nn.Linear(config.width, config.dim, bias=False)
        self.picture_out = nn.Linear(config.picture_width, config.dim, bias=False)
        init_weights(self, config.depth)

    def embed_features(self, values: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        """Unit vectors of pictures, of whose patches these are the features."""
        return F.normalize(self.picture_out(self.picture_norm(values.mean(1))), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b c"]:
        """Unit vectors of texts."""
        device = self.embedding.weight.device
        codes = self._tokenizer[0].encode([text or " " for text in texts])
        ids = codes.ids[:, 0, : self.config.length].to(device)
        lengths = codes.lengths[:, 0].clamp(max=self.config.length).to(device)
        places = torch.arange(ids.shape[1], device=device)
        valid = places < lengths[:, None]
        mask = valid[:, None, None, :].expand(-1, 1, len(places), -1)
        angles = self.rope(places[None, :, None].expand(len(ids), -1, 3))
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, angles, mask)
        mean = (self.text_norm(x) * valid[..., None]).sum(1) / lengths[:, None]
        return F.normalize(self.text_out(mean), dim=1)
