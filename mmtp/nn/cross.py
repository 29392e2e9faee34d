"""Gated cross-attention: what a model that knows sequences reads beside them, at first not at all."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmtp.nn.attention import LayerCache, attend
from mmtp.nn.block import Layer
from mmtp.nn.mlp import SwiGLU
from mmtp.nn.norm import RMSNorm


class CrossBlock(Layer):
    """Cross-attention and feed-forward, each through a tanh gate that starts at 0 (Flamingo, arXiv 2204.14198, section 2.2).

    With closed gates it changes nothing, so that it can be put between the blocks of a trained model. What is read has no rotary positions:
    where a vector belongs is for the vector to tell.

    Args:
        width: of the residual stream and of what is read.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: width of one head.
        mlp_width: hidden width of the gated feed-forward layer.
        eps: of all norms.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, mlp_width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.attention_norm, self.memory_norm, self.mlp_norm = (RMSNorm(width, eps) for _ in range(3))
        self.query = nn.Linear(width, num_heads * head_dim, bias=False)
        self.memory = nn.Linear(width, 2 * num_kv_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(head_dim, eps) for _ in range(2))
        self.mlp = SwiGLU(width, mlp_width)
        # One entry, not none: what processes divide among them has an axis.
        self.attention_gate, self.mlp_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        memory: Float[Tensor, "b m d"] | None,
        mask: Bool[Tensor, "b 1 s t"] | None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Reads.

        Args:
            x: the stream.
            memory: what may be read; in decoding what has come in with this pass. None where no position may read any.
            mask: True where a position may read; rows may be empty, and read 0.
            cache: None in training.
        """
        if memory is not None and mask is not None:
            x = x + self._dropped(self.attention_gate.tanh() * self.out(self._read(self.attention_norm(x), memory, mask, cache))).to(
                x.dtype
            )
        return x + self._dropped(self.mlp_gate.tanh() * self.mlp(self.mlp_norm(x))).to(x.dtype)

    def _read(self, x: Tensor, memory: Tensor, mask: Tensor, cache: LayerCache | None) -> Float[Tensor, "b s hd"]:
        key, value = self.memory(self.memory_norm(memory)).unflatten(-1, (2 * self.num_kv_heads, self.head_dim)).chunk(2, dim=2)
        query = self.q_norm(self.query(x).unflatten(-1, (-1, self.head_dim))).to(value.dtype).transpose(1, 2)
        key, value = self.k_norm(key).to(value.dtype).transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value)
        some = mask.any(-1, keepdim=True)
        # A row of the softmax must not be empty; what it gives where nothing may be read counts for nothing.
        read = torch.where(some, attend(query, key, value, mask | ~some), 0)
        return rearrange(read, "b h s hd -> b s (h hd)")


def last_span_mask(spans: Int[Tensor, "b s"], document_ids: Int[Tensor, "b s"]) -> Bool[Tensor, "b 1 s s"]:
    """True at the span that ended last before a position, in its document (Flamingo, arXiv 2204.14198, section 2.3).

    Args:
        spans: number of the span that a position belongs to, greater in later ones; -1 outside.
        document_ids: of every position.
    """
    inside, last = spans >= 0, spans.cummax(1).values
    may = (spans[:, None] == last[..., None]) & (document_ids[:, None] == document_ids[..., None])
    return (may & inside[:, None] & ~inside[..., None]).unsqueeze(1)
