"""The unified model: one embedding, one backbone, one unembedding over all media, and a head that predicts further ahead."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import mmtp.config
from mmtp.models.backbone import Backbone, BackboneConfig
from mmtp.models.embed import Embedding
from mmtp.models.heads.base import Head, HeadConfig, Places, vertical
from mmtp.models.heads.next import NextHead
from mmtp.models.loss import LossConfig, LossOutput, unified_loss
from mmtp.nn.attention import LayerCache, document_mask
from mmtp.nn.block import init_weights
from mmtp.stream.vocab import VocabLayout
from mmtp.types import Batch


class UnifiedModel(nn.Module):
    """Predicts the next tokens of a stream, whatever they stand for.

    Args:
        config: vocabulary and sizes.
    """

    slot_modality: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(mmtp.config.Config):
        """
        Attributes:
            layout: the vocabulary; tokenizers are named in it by name and fingerprint.
            backbone: sizes of the decoder.
            head: any registered head.
            tie_embeddings: use the embedding as unembedding.
            feature_width: width of continuous input features; 0 for none.
        """

        layout: VocabLayout
        backbone: BackboneConfig
        head: HeadConfig = field(default_factory=NextHead.Config)
        tie_embeddings: bool = True
        feature_width: int = 0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.layout.size, config.backbone.width, config.feature_width)
        self.backbone = Backbone(config.backbone)
        self.head: Any = config.head.build(backbone=config.backbone, modalities=config.layout.modalities)
        self.unembedding = (
            self.embedding.table if config.tie_embeddings else nn.Linear(config.backbone.width, config.layout.size, bias=False)
        )
        self.register_buffer("slot_modality", torch.tensor([slot.modality.index for slot in config.layout.slots]), persistent=False)
        assert isinstance(self.head, Head)
        init_weights(self, config.backbone.depth)

    def forward(self, batch: Batch, *, detach: bool = False, drafts: bool = True) -> list[Float[Tensor, "b s d"]]:
        """States of all offsets: the next token first, then one per draft offset, then that of the row below where the head has one.

        Args:
            batch: packed rows.
            detach: draft heads read the backbone without training it.
            drafts: whether their states are wanted.
        """
        x = self.embedding.batch(batch)
        causal = document_mask(batch.document_ids)
        spans = input_spans(batch, self.config.layout)
        mask = causal if spans is None else document_mask(batch.document_ids, spans)
        return self.compute_states(x, batch.positions, self.slot_modality[batch.slots], mask, causal, detach, drafts)

    def compute_states(
        self, x: Tensor, positions: Tensor, modality: Tensor, mask: Tensor, causal: Tensor, detach: bool, drafts: bool = True
    ) -> list[Tensor]:
        """The part of the forward pass that is arithmetic alone, and so can be compiled as one graph."""
        hidden = self.backbone(x, positions, mask)
        states = [self.backbone.norm(hidden)]
        if drafts and self.head.mtp_depth:
            source = (hidden.detach(), x.detach()) if detach else (hidden, x)
            # Always causal: a draft at t may know x[t+k], which a bidirectional span would carry back.
            states += self.head(*source, Places(positions, modality.roll(-1, 1), modality, causal))
        return states

    def loss(self, batch: Batch, config: LossConfig) -> LossOutput:
        """Loss of a batch over all modalities and offsets."""
        states = self(batch, detach=config.detach)
        return unified_loss(states, self.unembedding.weight, batch, self.config.layout, config, vertical(self.head) > 0)

    def embed(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        """Embeddings alone, as drafting needs them."""
        return self.embedding(tokens)

    def extend(
        self, tokens: Int[Tensor, "b s"], positions: Int[Tensor, "b s 3"], mask: Tensor, caches: Sequence[LayerCache]
    ) -> Float[Tensor, "b s d"]:
        """Hidden states (before the final norm) of a few more tokens, given what the caches hold."""
        return self.backbone(self.embedding(tokens), positions, mask, caches)

    def num_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())


def input_spans(batch: Batch, layout: VocabLayout) -> Int[Tensor, "b s"] | None:
    """Number of the continuous input span each position belongs to, -1 outside; None where the batch holds none.

    Inside such a span positions see each other both ways: the features came in at once, nothing in it is predicted.
    """
    index = layout.slot_index.get("feature.codes.0")
    if index is None or batch.features is None:
        return None
    inside = batch.slots == index
    starts = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, starts.cumsum(1), -1)
