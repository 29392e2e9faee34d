"""Experts: modules of one kind, of which each position of a pass goes through one that is named beforehand. Routing is not learnt."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.nn.attention import Attention, LayerCache, Masks
from mmtp.nn.block import Block
from mmtp.nn.linear import Linear
from mmtp.nn.mlp import SwiGLU
from mmtp.nn.norm import RMSNorm
from mmtp.nn.rope import Angles

FEWEST_ROWS = 4
"""Rows of an expert in decoding, where several have some: from four on, matrix kernels give each row the same result whatever their number,
so that a pass with drafts rounds as one without."""


@dataclass(frozen=True)
class Routes:
    """Which expert every position of a pass takes, worked out once for all layers.

    Attributes:
        index: the expert of every position, rows of the batch one behind the other.
        groups: flat places of each expert's positions; in decoding some may stand there more than once.
        inverse: where in all groups, one behind the other, each position stands.
        sole: the expert that all positions take, in decoding, where they take one; else -1.
    """

    index: Int[Tensor, " n"]
    groups: tuple[Int[Tensor, " _"], ...]
    inverse: Int[Tensor, " n"]
    sole: int = -1

    @staticmethod
    def of(index: Int[Tensor, "b s"], count: int) -> "Routes":
        """Those of a training pass. Experts without positions take part, so that each weight has a gradient in every process.

        Args:
            index: expert of every position, 0 to ``count`` - 1.
            count: experts.
        """
        flat = index.flatten()
        groups = tuple((flat == expert).nonzero()[:, 0] for expert in range(count))
        for group in groups:
            # Compiled code is to serve all sizes of groups: they differ from batch to batch.
            torch._dynamo.maybe_mark_dynamic(group, 0)
        return Routes(flat, groups, torch.cat(groups).argsort())

    @staticmethod
    def of_window(index: Sequence[int], count: int, device: torch.device) -> "Routes":
        """Those of a pass of decoding, without gradients, from numbers that are known on the host."""
        places: list[list[int]] = [[] for _ in range(count)]
        for place, expert in enumerate(index):
            places[expert].append(place)
        used = [expert for expert, own in enumerate(places) if own]
        if len(used) == 1:
            nothing = torch.empty(0, dtype=torch.long)
            return Routes(nothing, (), nothing, used[0])
        inverse, before = [0] * len(index), 0
        for own in places:
            for i, place in enumerate(own):
                inverse[place] = before + i
            if own:
                own += own[:1] * (FEWEST_ROWS - len(own))
            before += len(own)
        tensors = [torch.tensor(values, dtype=torch.long, device=device) for values in (index, inverse, *places)]
        return Routes(tensors[0], tuple(tensors[2:]), tensors[1])


class Experts(nn.ModuleDict):
    """Modules that map each position by itself, under one name each.

    Args:
        names: of the experts, in the order in which routes count them.
        make: gives an expert.
    """

    def __init__(self, names: Iterable[str], make: Callable[[], nn.Module]) -> None:
        super().__init__({name: make() for name in names})

    def forward(self, x: Float[Tensor, "b s *d"], routes: Routes) -> Float[Tensor, "b s *e"]:
        experts = list(self.values())
        if routes.sole >= 0:
            return experts[routes.sole](x)
        flat = x.flatten(0, 1)
        parts = [expert(flat.index_select(0, group)) for expert, group in zip(experts, routes.groups, strict=True)]
        return torch.cat(parts).index_select(0, routes.inverse).unflatten(0, x.shape[:2])


class ExpertNorm(Experts):
    """RMSNorm with a gain for every expert.

    Args:
        names: of the experts.
        width: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, names: Iterable[str], width: int, eps: float) -> None:
        super().__init__(names, lambda: RMSNorm(width, eps))
        self.eps = eps

    def forward(self, x: Float[Tensor, "b s *d"], routes: Routes) -> Float[Tensor, "b s *d"]:
        # Normalising is the same for all; gains are looked up, which takes no sorting, and rounds the same for one expert and several.
        gains: list[Any] = [norm.weight for norm in self.values()]
        gain = gains[routes.sole] if routes.sole >= 0 else torch.stack(gains)[routes.index].view(*x.shape[:2], *[1] * (x.ndim - 3), -1)
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * gain.float()).to(x.dtype)


class ExpertBlock(Block):
    """A :class:`~mmtp.nn.block.Block` some of whose parts each expert has of its own, while attention is over all positions.

    Args:
        names: of the experts.
        own_mlp: the feed-forward layer is theirs, not only the norms.
        own_attention: so are the projections of attention, and the norms of queries and keys.
        width: as of ``Block``, like all that follow.
    """

    def __init__(
        self, names: Sequence[str], own_mlp: bool, own_attention: bool, width: int, num_heads: int, num_kv_heads: int, head_dim: int,
        mlp_width: int, eps: float = 1e-6, qk_norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(width, num_heads, num_kv_heads, head_dim, mlp_width, eps, qk_norm)
        self.attention_norm = ExpertNorm(names, width, eps)
        self.mlp_norm = ExpertNorm(names, width, eps)
        if own_mlp:
            self.mlp = Experts(names, lambda: SwiGLU(width, mlp_width))
        if own_attention:
            self.attention = _ExpertAttention(names, width, num_heads, num_kv_heads, head_dim, eps, qk_norm)
        self.own_mlp, self.own_attention = own_mlp, own_attention

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        angles: Angles,
        mask: Masks,
        cache: LayerCache | None = None,
        routes: Routes | None = None,
        *,
        anchors: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b s d"]:
        assert routes is not None and anchors is None  # heads have blocks without experts
        attended = self.attention(self.attention_norm(x, routes), angles, mask, cache, *((routes,) if self.own_attention else ()))
        x = x + self._dropped(attended)
        return x + self._dropped(self.mlp(self.mlp_norm(x, routes), *((routes,) if self.own_mlp else ())))


class _ExpertAttention(Attention):
    """Attention whose projections take routes."""

    def __init__(
        self, names: Sequence[str], width: int, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, qk_norm: bool
    ) -> None:
        super().__init__(width, num_heads, num_kv_heads, head_dim, eps, qk_norm)
        self.qkv = Experts(names, lambda: Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=False))
        self.out = Experts(names, lambda: Linear(num_heads * head_dim, width, bias=False))
        if qk_norm:
            self.q_norm = ExpertNorm(names, head_dim, eps)
            self.k_norm = ExpertNorm(names, head_dim, eps)
