"""No draft head: next-token prediction alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.base import HeadConfig
from mmtp.nn.attention import LayerCache


class NextHead(nn.Module):
    """Predicts nothing beyond the next token; decoding with it is plain decoding."""

    mtp_depth = 0
    num_caches = 0

    @dataclass(frozen=True, kw_only=True)
    class Config(HeadConfig):
        """Has nothing to set."""

    def __init__(self, config: Config, backbone: BackboneConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        hidden: Float[Tensor, "b s d"],
        embedded: Float[Tensor, "b s d"],
        positions: Int[Tensor, "b s 3"],
        mask: Bool[Tensor, "b #h s s"],
    ) -> list[Float[Tensor, "b s d"]]:
        return []

    def draft(
        self,
        depth: int,
        state: Float[Tensor, "b s d"],
        embedded: Float[Tensor, "b s d"],
        positions: Int[Tensor, "b s 3"],
        mask: Bool[Tensor, "b #h s t"],
        caches: Sequence[LayerCache],
    ) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b s d"]]:
        raise ValueError("head 'next' drafts nothing; its mtp_depth is 0")
