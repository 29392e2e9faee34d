"""A small world for model tests: a vocabulary of text and pictures, random documents, packed batches."""

import numpy as np
import torch

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.next import NextHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.types import Batch, Modality, Segment

LAYOUT = VocabLayout(TextEntry("words", 50), (MediaEntry(Modality.IMAGE, "pictures", codebook_sizes=(40,)),), 16)
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
