"""Grouped-query attention with QK-norm, its masks, and the cache's view of one layer.

A mask says which position may look at which. It is a tensor of booleans, for any device; or blocks of them, of which FlexAttention skips
those that are empty (Dong et al., arXiv 2412.05496), on accelerators; or windows into which documents are laid out, on CPUs.

Legend: b batch, s positions of this pass, t positions attended to, h query heads, k key heads, g = h / k, hd head width. Where padding is
left out, b is 1, s counts the tokens of all lanes, and keys, values and masks are those of lanes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mmtp.nn.graphs import Graphs
from mmtp.nn.linear import Derived, Linear
from mmtp.nn.native import Held
from mmtp.nn.norm import RMSNorm
from mmtp.nn.ragged import Band, Ragged
from mmtp.nn.rope import Angles, rotate
from mmtp.nn.windows import Windows, additive

Mask = Bool[Tensor, "lanes #h asking t"] | Float[Tensor, "lanes #h gs t"] | BlockMask | Windows | None
Masks = Mask | list[Float[Tensor, "_ #h _ t"]]
"""Of a pass of decoding whose padding is left out, one for each band."""

LONGEST = 512
"""Keys up to which scores are multiplied out in training on a CPU in bfloat16."""


@runtime_checkable
class LayerCache(Protocol):
    """Keys and values of one layer: takes those of this pass, returns all that may be attended to."""

    @property
    def held(self) -> Held | None:
        """Where they are, for passes that are compiled for a CPU; None where passes are not."""
        ...

    @property
    def graphs(self) -> Graphs | None:
        """What records passes on an accelerator; None where they are not recorded."""
        ...

    @property
    def ragged(self) -> Ragged | None:
        """Which places of the pass hold tokens, where states are of these alone; None where they are of all."""
        ...

    def update(
        self, keys: Float[Tensor, "b k s hd"], values: Float[Tensor, "b k s hd"]
    ) -> tuple[Float[Tensor, "lanes k t hd"], Float[Tensor, "lanes k t hd"]]: ...

    def read(self) -> tuple[Float[Tensor, "lanes k t hd"], Float[Tensor, "lanes k t hd"]]:
        """Once more what ``update`` has returned in this pass."""
        ...


class Unnormed(nn.Module):
    """Stands where there is no norm."""

    def forward(self, x: Float[Tensor, "b s *d"], *routes: Any) -> Float[Tensor, "b s *d"]:
        return x


class Attention(nn.Module):
    """Self-attention as in Qwen3: grouped queries, RMSNorm on queries and keys, rotary positions, no biases.

    Args:
        width: of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: width of one head.
        eps: of the norms.
        qk_norm: whether queries and keys are normalised; without, this is Llama's attention.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, qk_norm: bool = True) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        # One matrix for queries, keys and values: at a few tokens per pass the number of calls is what costs.
        self.qkv: nn.Module = Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.out: nn.Module = Linear(num_heads * head_dim, width, bias=False)
        self.q_norm: nn.Module = RMSNorm(head_dim, eps) if qk_norm else Unnormed()
        self.k_norm: nn.Module = RMSNorm(head_dim, eps) if qk_norm else Unnormed()
        self.eps, self.qk_norm = eps, qk_norm
        self._gains = Derived()

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        angles: Angles,
        mask: Masks,
        cache: LayerCache | None = None,
        *routes: Any,
        anchors: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b _ d"]:
        """Attends.

        Args:
            x: normalised input.
            angles: rotary cosines and sines of the positions.
            mask: True where a position may look; or, in decoding, what :func:`fold_mask` makes of that, of each band where padding is left
                out.
            cache: None in training, where positions attend to this pass alone.
            routes: what the projections are told beside their input, where there are several of each (:mod:`mmtp.nn.experts`).
            anchors: positions that alone attend, to all; ``mask`` is theirs. None for all.
        """
        if cache is not None and not routes:
            return self._extend(x, angles, mask, cache)
        assert not isinstance(mask, list)
        h, k = self.num_heads, self.num_kv_heads
        asking = angles
        if anchors is None:
            q, key, value = self.qkv(x, *routes).unflatten(-1, (h + 2 * k, self.head_dim)).split((h, k, k), dim=2)
        else:
            ask, hold = cast(nn.Linear, self.qkv).weight.split((h * self.head_dim, 2 * k * self.head_dim))
            q = F.linear(gather(x, anchors), ask).unflatten(-1, (h, self.head_dim))
            key, value = F.linear(x, hold).unflatten(-1, (2 * k, self.head_dim)).chunk(2, dim=2)
            cos, sin = (gather(each.squeeze(2), anchors).unsqueeze(2) for each in angles)
            asking = cos, sin
        q = rotate(self.q_norm(q, *routes), asking).to(value.dtype).transpose(1, 2)
        key = rotate(self.k_norm(key, *routes), angles).to(value.dtype).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value)
        return self.out(rearrange(attend(q, key, value, mask), "b h s hd -> b s (h hd)"), *routes)

    def _extend(self, x: Float[Tensor, "b s d"], angles: Angles, mask: Masks, cache: LayerCache) -> Float[Tensor, "b s d"]:
        """The same for the few positions of a pass of decoding, in as few calls as there can be: queries and keys as one."""
        q, key, value = self.project(x, angles)
        keys, values = cache.update(key, value)
        if isinstance(mask, list):
            assert cache.ragged is not None
            read = torch.cat([self._band(band, q, keys, values, own) for band, own in zip(cache.ragged.bands, mask, strict=True)], 1)
        else:
            read = attend(q, keys, values, mask).transpose(1, 2)
        return self.out(read.flatten(2))

    def project(
        self, x: Float[Tensor, "b s d"], angles: Angles
    ) -> tuple[Float[Tensor, "b h s hd"], Float[Tensor, "b k s hd"], Float[Tensor, "b k s hd"]]:
        """Queries, keys and values of a pass of decoding; arguments are those of the call."""
        h, k, hd = self.num_heads, self.num_kv_heads, self.head_dim
        joined = self.qkv(x).unflatten(2, (h + 2 * k, hd))
        heads = joined.narrow(2, 0, h + k).float()
        if self.qk_norm:
            q_norm, k_norm = cast(RMSNorm, self.q_norm), cast(RMSNorm, self.k_norm)
            if torch.compiler.is_compiling():  # what is compiled cannot watch weights change
                gains = self._join(q_norm.weight, k_norm.weight)
            else:
                gains = self._gains.get((q_norm.weight, k_norm.weight), lambda: self._join(q_norm.weight, k_norm.weight))
            heads = torch.rms_norm(heads, (hd,), None, self.eps).mul_(gains)
        q, key = rotate(heads, angles).to(joined.dtype).transpose(1, 2).split((h, k), dim=1)
        return q, key, joined.narrow(2, h + k, k).transpose(1, 2)

    @staticmethod
    def _band(band: Band, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Float[Tensor, "1 n h hd"]:
        """What the tokens of some lanes read."""
        asking = band.ragged.spread(q[:, :, band.tokens].transpose(1, 2)).transpose(1, 2)
        return band.ragged.pack(attend(asking, keys[band.lanes], values[band.lanes], mask).transpose(1, 2))

    def _join(self, q: Float[Tensor, " hd"], k: Float[Tensor, " hd"]) -> Float[Tensor, "n hd"]:
        """Gains of every query and key head."""
        return torch.cat((q.expand(self.num_heads, -1), k.expand(self.num_kv_heads, -1))).float()


def gather(values: Num[Tensor, "b s d"], anchors: Int[Tensor, "b n"] | None) -> Num[Tensor, "b n d"]:
    """Rows of some anchors; None keeps all."""
    return values if anchors is None else values.gather(1, anchors.unsqueeze(2).expand(-1, -1, values.shape[2]))


def attend(
    q: Float[Tensor, "b h s hd"],
    k: Float[Tensor, "b k t hd"],
    v: Float[Tensor, "b k t hd"],
    mask: Mask,
) -> Float[Tensor, "b h s hd"]:
    """Scaled dot-product attention with grouped queries.

    A few queries are folded into the group, so that keys are read once and not copied per head; many are left to the kernel.
    """
    groups, s = q.shape[1] // k.shape[1], q.shape[2]
    if isinstance(mask, Windows):
        return mask.leave(attend(mask.enter(q), mask.enter(k), mask.enter(v), mask.mask), len(q))
    if isinstance(mask, BlockMask):
        return _flex(q.device.type)(q, k, v, block_mask=mask, enable_gqa=groups > 1)
    if _multiplies(q, k, mask):
        return _multiplied(q, k, v, mask)
    if not _folds(groups, s):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)
    folded = q.reshape(q.shape[0], k.shape[1], groups * s, q.shape[3])
    if mask is not None and mask.shape[2] == s:
        mask = _repeated(mask, groups)
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)


def _multiplies(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether two products and a softmax are the fastest way: backwards, SDPA's kernel for CPUs takes several times as long in bfloat16."""
    trains = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    return trains and k.shape[2] <= LONGEST and (mask is None or mask.shape[2] == q.shape[2])


def _multiplied(
    q: Float[Tensor, "b h s hd"], k: Float[Tensor, "b k t hd"], v: Float[Tensor, "b k t hd"], mask: Tensor | None
) -> Float[Tensor, "b h s hd"]:
    """Attention as it is written down (Vaswani et al. 2017, eq. 1), queries of a group folded; probabilities are kept for the way back."""
    b, h, s, hd = q.shape
    t = k.shape[2]
    folded, keys, values = (q * hd**-0.5).reshape(-1, h // k.shape[1] * s, hd), k.reshape(-1, t, hd), v.reshape(-1, t, hd)
    scores = torch.bmm(folded, keys.transpose(1, 2)).view(b, h, s, t)
    if mask is not None:
        scores += additive(mask, q.dtype)
    return torch.bmm(scores.softmax(-1).view(-1, folded.shape[1], t), values).view(q.shape)


def fold_mask(mask: Bool[Tensor, "b #h s t"], groups: int, dtype: torch.dtype) -> Float[Tensor, "b #h gs t"]:
    """A mask as :func:`attend` adds it to scores, queries of a group one behind the other where it folds them.

    Layers that share a mask save its making.
    """
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return _repeated(bias, groups) if _folds(groups, mask.shape[2]) else bias


def _folds(groups: int, s: int) -> bool:
    """Whether so many queries are folded into the group."""
    return groups > 1 and s <= 32


def _repeated(mask: Tensor, groups: int) -> Tensor:
    """The mask of folded queries; one row serves all."""
    return mask.repeat(1, 1, groups, 1) if mask.shape[2] > 1 else mask


@cache
def _flex(device: str) -> Any:
    """FlexAttention is fast only where it is compiled; on a CPU, where it has no backward pass, it serves comparisons."""
    return flex_attention if device == "cpu" else torch.compile(flex_attention)


def document_mask(
    document_ids: Int[Tensor, "b s"],
    bidirectional: Int[Tensor, "b s"] | None = None,
    until: Int[Tensor, "b s"] | None = None,
    window: int = 0,
) -> Bool[Tensor, "b 1 s s"]:
    """True where a position may look: back inside its own document, and anywhere inside its own bidirectional span.

    Args:
        document_ids: padding (-1) sees padding only, so that no row of the softmax is empty.
        bidirectional: number of the span a position belongs to whose positions see each other; -1 outside.
        until: the last position that each sees outside of its span; itself where nothing is given.
        window: how many positions each sees outside of its span at most, up to itself and with it; 0 for all.
    """
    rows, s = document_ids.shape
    row, place = (torch.arange(n, device=document_ids.device) for n in (rows, s))
    return _may_look(document_ids, bidirectional, until, window)(row[:, None, None], row, place[:, None], place).unsqueeze(1)


def document_blocks(
    document_ids: Int[Tensor, "b s"],
    bidirectional: Int[Tensor, "b s"] | None = None,
    until: Int[Tensor, "b s"] | None = None,
    window: int = 0,
) -> BlockMask:
    """The same in blocks, for FlexAttention."""
    rows, s = document_ids.shape
    return create_block_mask(_may_look(document_ids, bidirectional, until, window), rows, None, s, s, device=document_ids.device)


def _may_look(
    document_ids: Tensor, bidirectional: Tensor | None, until: Tensor | None, window: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a position may look at another, by row, head (all look alike) and both places."""
    # Lambdas: FlexAttention counts parameters, which a checker of shapes around a function would hide.
    if bidirectional is None and until is None and not window:
        return lambda row, head, query, key: (document_ids[row, query] == document_ids[row, key]) & (key <= query)
    own = torch.full_like(document_ids, -1) if bidirectional is None else bidirectional
    last = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids) if until is None else until
    seen = window or document_ids.shape[1]
    return lambda row, head, query, key: (
        (document_ids[row, query] == document_ids[row, key])
        & (((key <= last[row, query]) & (query - key < seen)) | ((own[row, query] == own[row, key]) & (own[row, query] >= 0)))
    )
