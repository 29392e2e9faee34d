"""A small world for model tests: a vocabulary of text and pictures, random documents, packed batches."""

from dataclasses import replace

import numpy as np
import torch

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.next import NextHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import PackDocument, collate
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.types import Batch, Modality, Segment

LAYOUT = VocabLayout(TextEntry("words", 50), (MediaEntry(Modality.IMAGE, "pictures", codebook_sizes=(40,)),), 16)
VECTORS = VocabLayout(LAYOUT.text, (*LAYOUT.media, MediaEntry(Modality.IMAGE, "vit")), 16)
GRAMMAR = StreamGrammar(LAYOUT)
BACKBONE = BackboneConfig(width=48, depth=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_width=64)


def model(depth: int = 2, **changes: object) -> UnifiedModel:
    """A tiny model with ``depth`` draft offsets; its embedding is large enough for distinct logits."""
    torch.manual_seed(0)
    head = SequentialHead.Config(mtp_depth=depth) if depth else NextHead.Config()
    built = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=head, **changes).build()
    torch.nn.init.normal_(built.embedding.table.weight, std=0.3)
    return built


def document(seed: int, words: int = 5, grid: tuple[int, int] = (3, 4)) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and target mask: a question, and an answer with a picture."""
    generator = torch.Generator().manual_seed(seed)
    text = Segment(Modality.TEXT, torch.randint(0, 50, (words,), generator=generator), target=False)
    picture = Segment(Modality.IMAGE, torch.randint(0, 40, (1, *grid), generator=generator))
    answer = Segment(Modality.TEXT, torch.randint(0, 50, (words,), generator=generator))
    encoded = encode_document(LAYOUT, (Turn("user", (text,)), Turn("assistant", (picture, answer))))
    return encoded.tokens, encoded.target_mask


def batch(count: int = 4, budget: int = 80, **kwargs: int) -> Batch:
    """Random documents, packed."""
    return collate([document(i, words=3 + i % 4, **kwargs) for i in range(count)], GRAMMAR, budget)


def reader(**changes: object) -> UnifiedModel:
    """A tiny model that reads vectors by cross-attention."""
    torch.manual_seed(0)
    backbone = replace(BACKBONE, cross_attention_every=1)
    config = UnifiedModel.Config(layout=VECTORS, backbone=backbone, head=SequentialHead.Config(mtp_depth=2), feature_width=5)
    net = replace(config, **changes).build()
    torch.nn.init.normal_(net.embedding.table.weight, std=0.3)
    return net


def opened(net: UnifiedModel) -> UnifiedModel:
    for block in net.backbone.cross:
        torch.nn.init.constant_(block.attention_gate, 1.0)
        torch.nn.init.constant_(block.mlp_gate, 1.0)
    return net


def asked(seed: int, answer: int = 0, pictures: int = 1) -> PackDocument:
    """Pictures as vectors, a word behind each, and an answer."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Segment] = []
    for i in range(pictures):
        parts.append(Segment(Modality.IMAGE, features=torch.randn(2, 2, 5, generator=generator), target=False))
        parts.append(Segment(Modality.TEXT, torch.tensor([1 + i]), target=False))
    said = Turn("assistant", (Segment(Modality.TEXT, torch.tensor([answer, answer])),))
    document = encode_document(VECTORS, (Turn("user", tuple(parts)), said))
    return PackDocument(document.tokens, document.target_mask, document.features, document.feature_grids)


def as_read(tokens: list[int]) -> Batch:
    """A stream of codes and words as training reads it, all of it a target."""
    info, shape = GRAMMAR.analyse(torch.tensor(tokens)), (1, len(tokens))
    return Batch(
        tokens=torch.tensor([tokens]),
        positions=torch.from_numpy(info.positions).long()[None],
        document_ids=torch.zeros(shape, dtype=torch.long),
        slots=torch.from_numpy(info.slots).long()[None],
        loss_mask=torch.ones(shape, dtype=torch.bool),
    )
