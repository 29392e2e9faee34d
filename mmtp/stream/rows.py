"""Rows of pictures and videos in packed batches: where the code above each one stands."""

import torch
from jaxtyping import Int
from torch import Tensor

from mmtp.stream.vocab import NUM_DIMS, VocabLayout
from mmtp.types import Batch


def above(batch: Batch, layout: VocabLayout) -> Int[Tensor, "b s"]:
    """Tokens back from every code to that of the same codebook one row above it, as :attr:`GrammarState.above` has it; 0 elsewhere."""
    slots = batch.slots
    codebooks = torch.zeros(len(layout.slots), dtype=torch.long, device=slots.device)
    for entry in layout.media:
        if not entry.continuous and NUM_DIMS[entry.modality] and not entry.pattern.max_delay:
            for k in range(entry.pattern.num_codebooks):
                codebooks[layout.slot_index[f"{entry.modality}.codes.{k}"]] = entry.pattern.num_codebooks
    here = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
    last_dim = torch.where(slots == layout.slot_index["dim"], here, 0).cummax(1).values
    width = batch.tokens.gather(1, last_dim) - layout.dim_range[0] + 1
    distance = codebooks[slots] * width
    source = (here - distance).clamp(min=0)
    # A code has a row above it if what stands so far back is a code of its document in the same column, one row higher.
    moved = batch.positions - batch.positions.gather(1, source.unsqueeze(2).expand(-1, -1, 3))
    same = (moved == moved.new_tensor((0, 1, 0))).all(2) & (batch.document_ids.gather(1, source) == batch.document_ids)
    return torch.where(same & (slots.gather(1, source) == slots), distance, 0)
