"""Transformers over the patches of a picture: what the picture tokenizers without convolutions are built of."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.config import Config
from mmtp.nn.block import Block, init_weights
from mmtp.nn.norm import RMSNorm
from mmtp.nn.rope import Rope

ROPE_THETA = 100.0
"""Base of the rotary frequencies: axes are some dozens of patches long, not thousands of words."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Sizes of a stack of blocks. The defaults are those of ViT-VQGAN's "small", with a gated feed-forward layer of as many weights.

    Attributes:
        width: of the residual stream.
        depth: number of blocks.
        num_heads: heads of attention; divides ``width`` into heads of an even width of at least 6.
        mlp_width: hidden width of the feed-forward layers.
    """

    width: int = 512
    depth: int = 8
    num_heads: int = 8
    mlp_width: int = 1376

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is wanted")
        head, rest = divmod(self.width, self.num_heads)
        # Rotary pairs are dealt out to three axes in turn; with fewer than three pairs, columns would have none.
        if rest or head % 2 or head < 6:
            raise ValueError(f"num_heads {self.num_heads}: width {self.width} must divide into heads of an even width of at least 6")


class Transformer(nn.Module):
    """Blocks over tokens of which each sees all others, by rotary positions on three axes; ends with a norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        head_dim = config.width // config.num_heads
        self.rope = Rope(head_dim, ROPE_THETA)
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.num_heads, head_dim, config.mlp_width) for _ in range(config.depth)
        )
        self.norm = RMSNorm(config.width)
        init_weights(self, config.depth)

    def forward(self, x: Float[Tensor, "b s d"], positions: Int[Tensor, "s 3"]) -> Float[Tensor, "b s d"]:
        angles = self.rope(positions.expand(len(x), -1, -1))
        for block in self.blocks:
            x = block(x, angles, None)
        return self.norm(x)


class PatchEmbedding(nn.Module):
    """Every patch of pixels by itself to a vector, in reading order."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(3 * patch**2, width)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b s d"]:
        return self.linear(rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch))


class PatchPixels(nn.Module):
    """Every vector to the pixels of its patch."""

    def __init__(self, config: TransformerConfig, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.head = tanh_head(config, 3 * patch**2)

    def forward(self, x: Float[Tensor, "b s d"], rows: int) -> Float[Tensor, "b 3 h w"]:
        return rearrange(self.head(x), "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=self.patch, q=self.patch)


def tanh_head(config: TransformerConfig, outputs: int) -> nn.Sequential:
    """Two layers with tanh between them: leaves no seams between patches (ViT-VQGAN, arXiv 2110.04627, section 3.1)."""
    return nn.Sequential(nn.Linear(config.width, config.mlp_width), nn.Tanh(), nn.Linear(config.mlp_width, outputs))


def plane(rows: int, columns: int, device: torch.device) -> Int[Tensor, "s 3"]:
    """Positions (time, row, column) of a grid in reading order; a picture is at time 0."""
    down, across = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return torch.cartesian_prod(torch.zeros(1, dtype=torch.long, device=device), down, across)
