"""No draft head: next-token prediction alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.base import HeadConfig, Places
from mmtp.nn.attention import LayerCache
from mmtp.types import Modality


class NextHead(nn.Module):
    """Predicts nothing beyond the next token; decoding with it is plain decoding."""

    mtp_depth = 0
    num_modules = 1
    num_caches = 0

    @dataclass(frozen=True, kw_only=True)
    class Config(HeadConfig):
        """Has nothing to set."""

    def __init__(self, config: Config, backbone: BackboneConfig, modalities: Sequence[Modality]) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        hidden: Float[Tensor, "b s d"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        anchors: Int[Tensor, "b n"] | None = None,
    ) -> list[Float[Tensor, "b n d"]]:
        return []

    def draft(
        self,
        depth: int,
        state: Float[Tensor, "b s *state"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        caches: Sequence[LayerCache],
    ) -> tuple[Float[Tensor, "b s *left"], Float[Tensor, "b s d"]]:
        raise ValueError("head 'next' drafts nothing; its mtp_depth is 0")
