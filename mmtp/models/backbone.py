"""The decoder: Qwen3-compatible, blind to modality. Embeddings in, hidden states (before the final norm) out."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import mmtp.config
from mmtp.nn.attention import Attention, LayerCache
from mmtp.nn.mlp import SwiGLU
from mmtp.nn.norm import RMSNorm
from mmtp.nn.rope import Angles, Rope


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


class Block(nn.Module):
    """Pre-norm attention and feed-forward, both residual."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config.width, config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(
        self, x: Float[Tensor, "b s d"], angles: Angles, mask: Bool[Tensor, "b #h s t"] | None, cache: LayerCache | None = None
    ) -> Float[Tensor, "b s d"]:
        x = x + self.attention(self.attention_norm(x), angles, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class Backbone(nn.Module):
    """A stack of blocks. Hidden states leave it before the final norm, for draft heads read them there.

    Args:
        config: sizes.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(config.head_dim, config.rope_theta)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        positions: Int[Tensor, "b s 3"],
        mask: Bool[Tensor, "b #h s t"] | None,
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


def init_weights(module: nn.Module, depth: int, std: float = 0.02) -> None:
    """Normal weights; the matrices that write into the residual stream are scaled by 1/sqrt(2 depth) (GPT-2, section 2.3)."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            residual = name.endswith(("attention.out", "mlp.down"))
            nn.init.normal_(child.weight, std=std / (2 * depth) ** 0.5 if residual else std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=std)
