"""Depth-wise multi-token prediction: a small transformer along the tokens that are predicted, for every anchor by itself.

It is the depth transformer of RQ-Transformer (Lee et al. 2022, arXiv 2203.01941, section 3.2.2) and of Moshi (Défossez et al. 2024,
arXiv 2410.00037, section 3.4.1), which write the residual codebooks of one frame from one state of the backbone. There the stream
has a place per frame; here it is flat, so the same transformer drafts the codes and the backbone verifies them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.base import DraftConfig, Places
from mmtp.nn.attention import LayerCache, gather
from mmtp.nn.linear import Linear
from mmtp.nn.norm import RMSNorm
from mmtp.nn.rope import Rope
from mmtp.types import Modality


class DepthHead(nn.Module):
    """State k at anchor t is the last one of a causal transformer over ``[h_t, E(x_{t+1}), …, E(x_{t+k})]``.

    No anchor looks at another, so nothing is kept between passes and a draft costs the same wherever it stands. All weights are
    shared by the offsets, which the rotary position along the depth axis tells apart.

    Args:
        config: ``mtp_depth`` and the sizes of the transformer.
        backbone: its width is that of what goes in and comes out; its ratio of feed-forward to width is kept.
        modalities: of the vocabulary.
    """

    num_modules = 1
    num_caches = 0

    @dataclass(frozen=True, kw_only=True)
    class Config(DraftConfig):
        """
        Attributes:
            width: of the transformer.
            num_layers: its blocks.
            num_heads: its attention heads; divides ``width``.
        """

        width: int = 256
        num_layers: int = 2
        num_heads: int = 4

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.width % (2 * self.num_heads):
                raise ValueError(f"width {self.width} of head 'depth' is no even multiple of its num_heads, {self.num_heads}")

    def __init__(self, config: Config, backbone: BackboneConfig, modalities: Sequence[Modality]) -> None:
        super().__init__()
        self.config = config
        sizes = BackboneConfig(
            width=config.width,
            depth=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.width // config.num_heads,
            mlp_width=backbone.mlp_width * config.width // backbone.width,
            norm_eps=backbone.norm_eps,
        )
        self.rope = Rope(sizes.head_dim, sizes.rope_theta)
        self.state_norm, self.embedding_norm = (RMSNorm(backbone.width, backbone.norm_eps) for _ in range(2))
        self.state, self.token = (Linear(backbone.width, config.width, bias=False) for _ in range(2))
        self.blocks = nn.ModuleList(sizes.block() for _ in range(config.num_layers))
        self.out = Linear(config.width, backbone.width, bias=False)
        self.norm = RMSNorm(backbone.width, backbone.norm_eps)

    @property
    def mtp_depth(self) -> int:
        return self.config.mtp_depth

    def forward(
        self,
        hidden: Float[Tensor, "b s d"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        anchors: Int[Tensor, "b n"] | None = None,
    ) -> list[Float[Tensor, "b n d"]]:
        tokens = self.token(self.embedding_norm(embedded))
        # Row t of each holds token t+k. What runs past the end is wrapped, which no valid row sees.
        rows = [self.state(self.state_norm(hidden)), *(tokens.roll(-k, 1) for k in range(1, self.mtp_depth + 1))]
        items = [gather(row, anchors) for row in rows]
        return list(self._run(torch.stack(items, dim=2)).unbind(2))

    def draft(
        self,
        depth: int,
        state: Float[Tensor, "b s *state"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        caches: Sequence[LayerCache],
    ) -> tuple[Float[Tensor, "b s *left"], Float[Tensor, "b s d"]]:
        # The state is all that the transformer reads, one item more at every offset: so few are cheaper read again than cached.
        state, embedded = (each.to(self.state.weight.dtype) for each in (state, embedded))  # compiled passes leave states in float32
        items = self.state(self.state_norm(state)).unsqueeze(2) if depth == 1 else state
        items = torch.cat((items, self.token(self.embedding_norm(embedded)).unsqueeze(2)), dim=2)
        return items, self._run(items)[:, :, -1]

    def _run(self, items: Float[Tensor, "b s n w"]) -> Float[Tensor, "b s n-1 d"]:
        """States of all offsets whose tokens are there."""
        b, s, n, _ = items.shape
        x = rearrange(items, "b s n w -> (b s) n w")
        steps = torch.arange(n, device=x.device)
        cos, sin = (angle.expand(len(x), -1, -1, -1) for angle in self.rope(steps[None, :, None].expand(1, n, 3)))
        mask = (steps <= steps[:, None]).expand(len(x), 1, n, n)
        for block in self.blocks:
            x = block(x, (cos, sin), mask)
        return self.norm(self.out(rearrange(x[:, 1:], "(b s) n w -> b s n w", b=b, s=s)))
