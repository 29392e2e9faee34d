"""The decoder: Qwen3-compatible, blind to modality. Embeddings in, hidden states (before the final norm) out."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

import mmtp.config
from mmtp.nn.attention import LayerCache
from mmtp.nn.block import Block
from mmtp.nn.norm import RMSNorm
from mmtp.nn.rope import Rope


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(mmtp.config.Config):
    """Sizes of the decoder, in the terms of Qwen3.

    Attributes:
        width: of the residual stream.
        depth: number of blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: width of one head, even.
        mlp_width: hidden width of the gated feed-forward layer.
        rope_theta: base of the rotary frequencies.
        norm_eps: of all norms.
    """

    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    def block(self) -> Block:
        """A block of these sizes."""
        return Block(self.width, self.num_heads, self.num_kv_heads, self.head_dim, self.mlp_width, self.norm_eps)


class Backbone(nn.Module):
    """A stack of blocks. Hidden states leave it before the final norm, for draft heads read them there.

    Args:
        config: sizes.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(config.head_dim, config.rope_theta)
        self.blocks = nn.ModuleList(config.block() for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        positions: Int[Tensor, "b s 3"],
        mask: Bool[Tensor, "b #h s t"] | BlockMask | None,
        caches: Sequence[LayerCache] | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Hidden states before ``norm``.

        Args:
            x: embeddings.
            positions: rotary positions (time, row, column).
            mask: True where a position may look.
            caches: one per block in decoding, None in training.
        """
        angles = self.rope(positions)
        for i, block in enumerate(self.blocks):
            x = block(x, angles, mask, None if caches is None else caches[i])
        return x
