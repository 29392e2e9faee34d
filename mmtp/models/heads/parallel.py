"""Parallel multi-token prediction: a block per offset, each reading the backbone alone (Gloeckle et al., arXiv 2404.19737, section 2)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.base import BlockConfig, Places
from mmtp.nn.attention import LayerCache
from mmtp.nn.linear import Derived
from mmtp.nn.native import Program
from mmtp.nn.norm import RMSNorm
from mmtp.types import Modality


class _Offset(nn.Module):
    def __init__(self, backbone: BackboneConfig) -> None:
        super().__init__()
        self.block = backbone.block()
        self.norm = RMSNorm(backbone.width, backbone.norm_eps)
        self.program = Derived()


class ParallelHead(nn.Module):
    """D transformer blocks side by side, ``g^k = Block_k(h)``: none knows what another has drafted, nor what lies between.

    Of the tokens in between a block knows the rotary position alone, which the grammar gives.

    Args:
        config: ``mtp_depth``, and the width of the blocks where it is not the backbone's.
        backbone: sizes of the blocks.
        modalities: of the vocabulary.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """How many blocks there are."""

    def __init__(self, config: Config, backbone: BackboneConfig, modalities: Sequence[Modality]) -> None:
        super().__init__()
        backbone = config.sizes(backbone)
        self.config = config
        self.rope, self._sizes = backbone.rope(), backbone
        self.offsets = nn.ModuleList(_Offset(backbone) for _ in range(config.mtp_depth))

    @property
    def mtp_depth(self) -> int:
        return self.config.mtp_depth

    @property
    def num_modules(self) -> int:
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
        return [self._run(k, hidden, places.ahead(k), None, anchors) for k in range(1, self.mtp_depth + 1)]

    def draft(
        self,
        depth: int,
        state: Float[Tensor, "b s *state"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        caches: Sequence[LayerCache],
    ) -> tuple[Float[Tensor, "b s *left"], Float[Tensor, "b s d"]]:
        return state, self._run(depth, state, places, caches[depth - 1])

    def _run(self, depth: int, hidden: Tensor, places: Places, cache: LayerCache | None, anchors: Tensor | None = None) -> Tensor:
        module: Any = self.offsets[depth - 1]
        if cache is not None and (held := cache.held) is not None:
            program = held.programs.get(module) or held.programs.setdefault(module, self._compiled(module))
            return program(hidden, places.positions, places.mask, held)[1]
        return module.norm(module.block(hidden, self.rope(places.positions), places.at(anchors).mask, cache, anchors=anchors))

    def _compiled(self, module: _Offset) -> Program:
        weights = replace(module.block.weights, last_norm=module.norm.weight)
        return module.program.get(weights.all, lambda: self._sizes.program([weights], self.rope))
