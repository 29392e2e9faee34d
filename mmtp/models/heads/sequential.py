"""Sequential multi-token prediction: a module per depth, each reading the one before (DeepSeek-V3, section 2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.base import BlockConfig, Places
from mmtp.nn.attention import LayerCache, gather
from mmtp.nn.linear import Derived, Linear
from mmtp.nn.native import Program
from mmtp.nn.norm import RMSNorm
from mmtp.types import Modality


class _Depth(nn.Module):
    """``g^k = Block(W [RMS(E(x_{t+k})) ; RMS(g^{k-1}_t)])`` (eqs. 21 and 22); embedding first, as released checkpoints have it."""

    def __init__(self, backbone: BackboneConfig) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(backbone.width, backbone.norm_eps)
        self.state_norm = RMSNorm(backbone.width, backbone.norm_eps)
        self.project = Linear(2 * backbone.width, backbone.width, bias=False)
        self.block = backbone.block()
        self.norm = RMSNorm(backbone.width, backbone.norm_eps)
        self.program = Derived()


class SequentialHead(nn.Module):
    """D modules of one transformer block each, causal over the anchors, sharing the model's embedding and unembedding.

    Args:
        config: ``mtp_depth``, and the width of the blocks where it is not the backbone's.
        backbone: sizes of the blocks.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """How many modules there are."""

    def __init__(self, config: Config, backbone: BackboneConfig, modalities: Sequence[Modality]) -> None:
        super().__init__()
        backbone = config.sizes(backbone)
        self.config = config
        self.rope, self._sizes = backbone.rope(), backbone
        self.depths = nn.ModuleList(_Depth(backbone) for _ in range(self.num_modules))

    @property
    def mtp_depth(self) -> int:
        return self.config.mtp_depth

    @property
    def num_modules(self) -> int:
        """Modules: one per depth."""
        return self.mtp_depth

    @property
    def num_caches(self) -> int:
        return self.mtp_depth

    def forward(
        self,
        hidden: Float[Tensor, "b s d"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        anchors: Int[Tensor, "b n"] | None = None,
    ) -> list[Float[Tensor, "b n d"]]:
        states, state = [], hidden
        for k in range(1, self.mtp_depth):
            # Row t now holds token t+k. The k rows that run past the end hold wrapped ones, which no valid row looks at.
            state, out = self._run(k, state, embedded.roll(-k, 1), places.ahead(k), None)
            states.append(gather(out, anchors))
        # Nothing is read of the last depth, so that of its rows those are enough that are wanted.
        k = self.mtp_depth
        return [*states, self._run(k, state, embedded.roll(-k, 1), places.ahead(k), None, anchors)[1]]

    def draft(
        self,
        depth: int,
        state: Float[Tensor, "b s *state"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        caches: Sequence[LayerCache],
    ) -> tuple[Float[Tensor, "b s *left"], Float[Tensor, "b s d"]]:
        return self._run(depth, state, embedded, places, caches[depth - 1])

    def _run(
        self, depth: int, state: Tensor, embedded: Tensor, places: Places, cache: LayerCache | None, anchors: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        module: Any = self.depths[min(depth, self.num_modules) - 1]
        if cache is not None and (held := cache.held) is not None:
            program = held.programs.get(module) or held.programs.setdefault(module, self._compiled(module))
            return program(state, places.positions, places.mask, held, embedded)
        joined = torch.cat((module.embedding_norm(embedded), module.state_norm(state).to(embedded.dtype)), dim=-1)
        state = module.block(module.project(joined), self.rope(places.positions), places.at(anchors).mask, cache, anchors=anchors)
        return state, module.norm(state)

    def _compiled(self, module: _Depth) -> Program:
        join = (module.embedding_norm.weight, module.state_norm.weight, module.project.weight)
        weights = replace(module.block.weights, join=join, last_norm=module.norm.weight)
        return module.program.get(weights.all, lambda: self._sizes.program([weights], self.rope))
