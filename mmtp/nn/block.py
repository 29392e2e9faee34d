"""The transformer block that models and tokenizers are built of, and the weights it starts from."""

from typing import cast

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.nn.attention import Attention, LayerCache, Masks, attend, gather
from mmtp.nn.graphs import fused
from mmtp.nn.mlp import SwiGLU
from mmtp.nn.native import Weights
from mmtp.nn.norm import RMSNorm
from mmtp.nn.rope import Angles


class Layer(nn.Module):
    """What models are a stack of, and training may divide among processes, compile or compute once more, each by itself.

    Attributes:
        dropout: share of what the layer adds to the stream that is left out in training (residual dropout; Vaswani et al. 2017,
            section 5.4). Training sets it; of what a model is it is no part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropout = 0.0

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Block(Layer):
    """Pre-norm attention and feed-forward, both residual.

    Args:
        width: of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: width of one head, even.
        mlp_width: hidden width of the gated feed-forward layer.
        eps: of all norms.
        qk_norm: whether queries and keys are normalised.
    """

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, mlp_width: int, eps: float = 1e-6, qk_norm: bool = True
    ) -> None:
        super().__init__()
        self.attention_norm: nn.Module = RMSNorm(width, eps)
        self.attention = Attention(width, num_heads, num_kv_heads, head_dim, eps, qk_norm)
        self.mlp_norm: nn.Module = RMSNorm(width, eps)
        self.mlp: nn.Module = SwiGLU(width, mlp_width)

    @property
    def weights(self) -> Weights:
        """Its weights, for passes that are compiled."""
        attention, mlp = self.attention, cast(SwiGLU, self.mlp)
        return Weights(
            attention_norm=cast(RMSNorm, self.attention_norm).weight,
            qkv=cast(nn.Linear, attention.qkv).weight,
            q_norm=cast(RMSNorm, attention.q_norm).weight if attention.qk_norm else None,
            k_norm=cast(RMSNorm, attention.k_norm).weight if attention.qk_norm else None,
            out=cast(nn.Linear, attention.out).weight,
            mlp_norm=cast(RMSNorm, self.mlp_norm).weight,
            gate_up=mlp.gate_up.weight,
            down=mlp.down.weight,
        )

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        angles: Angles,
        mask: Masks,
        cache: LayerCache | None = None,
        *,
        anchors: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b _ d"]:
        """Goes on from a stream's states.

        Args:
            x: the states.
            angles: rotary cosines and sines of the positions.
            mask: True where a position may look; see :class:`mmtp.nn.attention.Attention`.
            cache: of decoding.
            anchors: positions of which alone states are wanted, in training; ``mask`` is theirs. None wants all.
        """
        if cache is not None and cache.graphs is not None:
            assert not isinstance(mask, list)
            q, key, value = fused(Block._ask)(self, x, angles)
            read = attend(q, *cache.update(key, value), mask).transpose(1, 2).flatten(2)
            return fused(Block._answer)(self, x, read)
        if cache is not None:
            x = self.attention(self.attention_norm(x), angles, mask, cache).add_(x)
            return self.mlp(self.mlp_norm(x)).add_(x)
        attended = self.attention(self.attention_norm(x), angles, mask, cache, anchors=anchors)
        x = gather(x, anchors) + self._dropped(attended)
        return x + self._dropped(self.mlp(self.mlp_norm(x)))

    def _ask(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention."""
        return self.attention.project(self.attention_norm(x), angles)

    def _answer(self, x: Tensor, read: Tensor) -> Tensor:
        """What comes behind it."""
        x = x + self.attention.out(read)
        return x + self.mlp(self.mlp_norm(x))


def init_weights(module: nn.Module, depth: int, std: float = 0.02) -> None:
    """Normal weights; the matrices that write into the residual stream are scaled by 1/sqrt(2 depth) (GPT-2, section 2.3)."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            parts = name.split(".")  # of experts, "attention.out.NAME" and "mlp.NAME.down"
            residual = {"attention", "out"} <= {*parts} or {"mlp", "down"} <= {*parts}
            nn.init.normal_(child.weight, std=std / (2 * depth) ** 0.5 if residual else std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=std)
