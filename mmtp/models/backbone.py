"""The decoder: Qwen3-compatible. Embeddings in, hidden states (before the final norm) out.

It is blind to modality, unless its configuration gives every medium weights of its own: then it is told which medium each position belongs
to (Mixture-of-Transformers; Liang et al., arXiv 2411.04996, section 2.2 and algorithm 1). Attention is over the whole stream either way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

import mmtp.config
from mmtp.nn.attention import LayerCache, Masks, fold_mask
from mmtp.nn.block import Block
from mmtp.nn.cross import CrossBlock
from mmtp.nn.experts import ExpertBlock, Routes
from mmtp.nn.linear import Derived
from mmtp.nn.native import Program, Weights
from mmtp.nn.norm import RMSNorm
from mmtp.nn.rope import Rope, RopeScaling
from mmtp.nn.windows import Windows
from mmtp.types import Modality

OWN = ("none", "norms", "mlp", "all")
"""Values of ``modality_specific``, each with the weights of the one before and more."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(mmtp.config.Config):
    """Sizes of the decoder, in the terms of Qwen3; without ``qk_norm`` in those of Llama.

    Attributes:
        width: of the residual stream.
        depth: number of blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: width of one head, even.
        mlp_width: hidden width of the gated feed-forward layer.
        rope_theta: base of the rotary frequencies.
        rope_scaling: of the rotary frequencies, as Llama 3.1 has it; None for none.
        norm_eps: of all norms.
        qk_norm: whether queries and keys are normalised (RMSNorm on each head), as in Qwen3 and not in Llama.
        modality_specific: weights that every medium has of its own in each block: ``norms``; ``mlp``, norms and feed-forward layer; or
            ``all``, the projections of attention as well. A position takes those of its medium, so that arithmetic stays the same.
            The final norm is common to all. Blocks of draft heads have none.
        cross_attention_every: n; before every n-th block, a gated cross-attention block reads the vectors of the continuous span that
            ended last (Flamingo, arXiv 2204.14198, section 2.2), which then do not stand in the stream. 0: they do.
        window: of attention: a position attends to so many positions of its document at most, itself and those right before it (Mistral,
            arXiv 2310.06825, section 2), in draft heads as well; to all of a span whose positions see each other. 0: no limit.
    """

    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qk_norm: bool = True
    modality_specific: Literal["none", "norms", "mlp", "all"] = "none"
    cross_attention_every: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.cross_attention_every <= self.depth:
            raise ValueError(f"cross_attention_every {self.cross_attention_every}: 0 to the depth, {self.depth}, is wanted")
        if self.window < 0:
            raise ValueError(f"window {self.window}: 1 or more is wanted, or 0 for no limit")
        if self.window and self.cross_attention_every:
            raise ValueError(
                "window: cross-attention reads vectors however far behind they stand; leave out window or cross_attention_every"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    def block(self) -> Block:
        """A block of these sizes, the same for all media."""
        return Block(*self._sizes)

    def expert_block(self, modalities: Sequence[Modality]) -> ExpertBlock:
        """A block of these sizes with the weights that ``modality_specific`` gives every medium."""
        own_mlp, own_attention = self.modality_specific in ("mlp", "all"), self.modality_specific == "all"
        return ExpertBlock([str(m) for m in modalities], own_mlp, own_attention, *self._sizes)

    def rope(self) -> Rope:
        """The rotary embedding of its heads."""
        return Rope(self.head_dim, self.rope_theta, self.rope_scaling)

    def program(self, weights: Sequence[Weights], rope: Rope, exchange: Float[Tensor, "n n"] | None = None) -> Program:
        """Blocks of these sizes, compiled; arguments are those of :class:`mmtp.nn.native.Program`."""
        return Program(
            weights,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            eps=self.norm_eps,
            frequencies=rope.frequencies,
            axis=rope.axis,
            exchange=exchange,
        )

    @property
    def num_cross(self) -> int:
        """Cross-attention blocks."""
        return self.depth // self.cross_attention_every if self.cross_attention_every else 0

    @property
    def num_caches(self) -> int:
        """Layers of keys and values that decoding keeps: of the blocks, then of cross-attention."""
        return self.depth + self.num_cross

    @property
    def _sizes(self) -> tuple[int, int, int, int, int, float, bool]:
        return self.width, self.num_heads, self.num_kv_heads, self.head_dim, self.mlp_width, self.norm_eps, self.qk_norm


@dataclass(frozen=True)
class Context:
    """What cross-attention reads.

    Attributes:
        vectors: at the places of the stream that are theirs; what stands elsewhere does not count.
        mask: True where a position may read one; in decoding, one that came in with an earlier pass as well.
    """

    vectors: Float[Tensor, "b s d"]
    mask: Bool[Tensor, "b 1 s t"]


class Backbone(nn.Module):
    """A stack of blocks. Hidden states leave it before the final norm, for draft heads read them there.

    Args:
        config: sizes.
        modalities: of the vocabulary; only ``modality_specific`` asks for them.
    """

    experts: Tensor

    def __init__(self, config: BackboneConfig, modalities: Sequence[Modality] = ()) -> None:
        super().__init__()
        self.config = config
        self.rope = config.rope()
        own = config.modality_specific != "none"
        self.blocks = nn.ModuleList(config.expert_block(modalities) if own else config.block() for _ in range(config.depth))
        self.cross = nn.ModuleList(CrossBlock(*config._sizes[:-1]) for _ in range(config.num_cross))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.num_experts = len(modalities) if own else 0
        self._expert = {modality.index: i for i, modality in enumerate(modalities)}
        expert = [self._expert.get(modality.index, 0) for modality in Modality]
        self.register_buffer("experts", torch.tensor(expert), persistent=False)
        self._program = Derived()

    @property
    def uncompiled(self) -> str:
        """What it has that compiled passes have not; empty where they can be."""
        if self.num_experts:
            return f"weights of each medium's own (modality_specific = {self.config.modality_specific!r})"
        if self.cross:
            return "cross-attention"
        weight = self.norm.weight
        compiled = weight.device.type != "cpu" or weight.dtype in (torch.float32, torch.bfloat16)
        return "" if compiled else f"weights in {weight.dtype} on the CPU"

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        positions: Int[Tensor, "b s 3"],
        mask: Bool[Tensor, "b #h s t"] | BlockMask | Windows | None,
        caches: Sequence[LayerCache] | None = None,
        routes: Routes | None = None,
        context: Context | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Hidden states before ``norm``.

        Args:
            x: embeddings.
            positions: rotary positions (time, row, column).
            mask: True where a position may look.
            caches: ``num_caches`` of the configuration in decoding, None in training.
            routes: which medium's weights each position takes, of :meth:`routes` or :meth:`window_routes`; None where all share theirs.
            context: what cross-attention reads; None where there is nothing to be read.
        """
        if caches and (held := caches[0].held) is not None:
            assert isinstance(mask, Tensor)
            program = held.programs.get(self) or held.programs.setdefault(self, self._compiled())
            return program(x, positions, mask, held)[0]
        if caches and (graphs := caches[0].graphs) is not None:
            assert isinstance(mask, Tensor)
            return graphs(partial(self._blocks, caches=caches), x, positions, mask)
        return self._blocks(x, positions, mask, caches, routes, context)

    def _blocks(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | BlockMask | Windows | None,
        caches: Sequence[LayerCache] | None = None,
        routes: Routes | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """The same, kernel by kernel."""
        ragged = caches[0].ragged if caches else None
        if ragged is not None:
            assert routes is None and context is None
            x, positions = ragged.pack(x), ragged.pack(positions)
        angles = self.rope(positions)
        may: Masks = mask
        if caches is not None and isinstance(mask, Tensor):
            groups = self.config.num_heads // self.config.num_kv_heads
            if ragged is None:
                may = fold_mask(mask, groups, x.dtype)
            else:
                may = [fold_mask(mask[band.lanes, :, : band.ragged.width], groups, x.dtype) for band in ragged.bands]
        elif isinstance(mask, Windows):
            may = mask.biased(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)
        own = () if routes is None else (routes,)
        every, (vectors, seen) = self.config.cross_attention_every, (None, None) if context is None else (context.vectors, context.mask)
        for i, block in enumerate(self.blocks):
            if every and (i + 1) % every == 0:
                n = i // every
                x = self.cross[n](x, vectors, seen, None if caches is None else caches[len(self.blocks) + n])
            x = block(x, angles, may, None if caches is None else caches[i], *own)
        return x if ragged is None else ragged.spread(x)

    def _compiled(self) -> Program:
        weights = [cast(Block, block).weights for block in self.blocks]
        return self._program.get([weight for each in weights for weight in each.all], lambda: self.config.program(weights, self.rope))

    def routes(self, modality: Int[Tensor, "b s"]) -> Routes | None:
        """Of the positions of a training pass, by ``Modality.index``; None where media share their weights."""
        return Routes.of(self.experts[modality], self.num_experts) if self.num_experts else None

    def window_routes(self, modality: Sequence[Sequence[int]], width: int) -> Routes | None:
        """The same for a pass of decoding.

        Args:
            modality: ``Modality.index`` of the positions of every row, as many as it has.
            width: positions per row, padding included.
        """
        if not self.num_experts:
            return None
        # Padding goes where other positions go, so that it makes no expert work that has none of them.
        rest = next((row[0] for row in modality if row), 0)
        padded = [self._expert[kind] for row in modality for kind in (*row, *[rest] * (width - len(row)))]
        return Routes.of_window(padded, self.num_experts, self.experts.device)


def upcycled(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Weights for a backbone of which media have more of their own, or that has more media (sparse upcycling; arXiv 2212.05055, section 3).

    Experts begin as copies of the weights that all media shared, those of a new medium as copies of text's. The model computes what it
    computed before.

    Args:
        state: of a backbone or of what contains one.
        names: of the weights that are wanted; those that have no source in ``state`` are left out.
    """
    found = {}
    for name in names:
        parts = name.split(".")
        medium = next((i for i, part in enumerate(parts) if part in set(Modality)), None)
        sources = [name]
        if medium is not None:
            sources += [".".join(parts[:medium] + part + parts[medium + 1 :]) for part in ([], [str(Modality.TEXT)])]
        source = next((source for source in sources if source in state), None)
        if source is not None:
            found[name] = state[source]
    return found
