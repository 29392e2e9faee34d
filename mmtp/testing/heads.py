"""What every head must keep, registered or your own: causality, documents apart, drafting equal to training, no change of output."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtp.decode.cache import KVCache
from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling
from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.base import BELOW, Head, HeadConfig, Places, offset_name, vertical
from mmtp.models.unified import UnifiedModel
from mmtp.nn.attention import document_mask, gather
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabLayout
from mmtp.testing.conformance import require
from mmtp.types import Batch, Modality, Segment

LAYOUT = VocabLayout(TextEntry("words", 50), (MediaEntry(Modality.IMAGE, "pictures", codebook_sizes=(40,)),), 16)
BACKBONE = BackboneConfig(width=48, depth=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_width=64)


def check_head(config: HeadConfig) -> None:
    """Holds a head to the contract of :mod:`mmtp.models.heads.base`, in a tiny model with random weights.

    Raises:
        ConformanceError: says which promise is broken, and where.
    """
    torch.manual_seed(0)
    model = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=config).build().eval()
    torch.nn.init.normal_(model.embedding.table.weight, std=0.3)
    require(isinstance(model.head, Head), f"{type(model.head).__name__} lacks a part of the Head protocol")
    require(type(config).from_dict(config.to_dict()) == config, "the configuration does not survive to_dict and from_dict")
    batch = example_batch(3)
    states = model(batch)
    offsets = [*range(1 + model.head.mtp_depth), *([BELOW] if vertical(model.head) else [])]
    wanted = f"mtp_depth is {model.head.mtp_depth} and vertical {vertical(model.head)}"
    require(len(states) == len(offsets), f"{len(states) - 1} draft states, but {wanted}")
    _check_causality(model, batch, states, offsets)
    _check_documents(model, batch, states, offsets)
    _check_anchors(model, batch, states, offsets)
    _check_drafting(model, offsets[1:])
    _check_lossless(model)
    if model.head.mtp_depth:
        check_vectors(config)


def _check_causality(model: UnifiedModel, batch: Batch, states: list[Tensor], offsets: list[int]) -> None:
    length = int((batch.document_ids[0] == 0).sum())
    for moved in range(3, length, 4):
        tokens = batch.tokens.clone()
        tokens[0, moved] = (tokens[0, moved] + 1) % 40
        for offset, before, after in zip(offsets, states, model(dataclasses.replace(batch, tokens=tokens)), strict=True):
            same = (before == after).all(-1)[0, : max(0, moved - max(offset, 0))]
            where = int(same.int().argmin()) if len(same) else 0
            require(bool(same.all()), f"offset {offset_name(offset)} at position {where} reads token {moved}, which lies further ahead")


def _check_documents(model: UnifiedModel, batch: Batch, states: list[Tensor], offsets: list[int]) -> None:
    row = int(batch.document_ids.amax(1).argmax())
    tokens = batch.tokens.clone()
    tokens[row, 2] = (tokens[row, 2] + 1) % 40
    others = batch.document_ids[row] > 0
    for offset, before, after in zip(offsets, states, model(dataclasses.replace(batch, tokens=tokens)), strict=True):
        same = bool((before == after)[row][others].all())
        require(same, f"offset {offset_name(offset)}: a document sees another one of its row")


def _check_anchors(model: UnifiedModel, batch: Batch, states: list[Tensor], offsets: list[int]) -> None:
    """Some anchors alone have the states that they have among all."""
    rows, length = batch.tokens.shape
    anchors = torch.stack([torch.randperm(length)[: length // 3].sort().values for _ in range(rows)])
    for offset, before, after in zip(offsets[1:], states[1:], model(batch, anchors=anchors)[1:], strict=True):
        require(after.shape[1] == anchors.shape[1], f"offset {offset_name(offset)}: {after.shape[1]} states for {anchors.shape[1]} anchors")
        worst = float((after - gather(before, anchors)).detach().abs().max())
        require(worst < 1e-4, f"offset {offset_name(offset)}: an anchor's state differs by {worst:.2g} where others are not wanted")


def _check_drafting(model: UnifiedModel, offsets: list[int]) -> None:
    """Drafting a few anchors at a time, over a cache, gives the states that training gives to all at once."""
    tokens, _ = _document(7)
    info = StreamGrammar(LAYOUT).analyse(tokens)
    ids, positions, modality = (torch.from_numpy(array).long()[None] for array in (tokens, info.positions, info.modality))
    s, depth = len(tokens), model.head.mtp_depth
    mask = document_mask(torch.zeros(1, s, dtype=torch.long))
    places = Places(positions, modality.roll(-1, 1), modality, mask)
    with torch.no_grad():
        embedded = model.embed(ids)
        hidden = model.backbone(embedded, positions, mask)
        wanted = model.head(hidden, embedded, places)
        cache = KVCache(model.head.num_caches, 1, BACKBONE.num_kv_heads, BACKBONE.head_dim, s)
        for start, end in ((0, 5), (5, 6), (6, s - depth)):
            state, seen = hidden[:, start:end], cache.begin(end - start)
            banks = torch.nn.functional.pad(modality, (0, cache.extent))[:, : cache.extent]
            for k, offset in enumerate(offsets):
                ahead = 0 if offset == BELOW else offset
                read, kinds = slice(start + ahead, end + ahead), slice(start + ahead + 1, end + ahead + 1)
                there = Places(positions[:, read], torch.nn.functional.pad(modality, (0, 1))[:, kinds], banks, seen)
                if offset == BELOW:
                    out = model.head.below(hidden[:, start:end], embedded[:, read], there, cache.layers)
                else:
                    state, out = model.head.draft(offset, state, embedded[:, read], there, cache.layers)
                worst = float((out - wanted[k][:, start:end]).abs().max())
                name = offset_name(offset)
                require(worst < 1e-4, f"offset {name}: drafting differs from training by {worst:.2g} at anchors {start} to {end - 1}")
            cache.commit([end - start])


def _check_lossless(model: UnifiedModel) -> None:
    engine, prefix = Engine(model, exact=True, draft_cost=0, drafts=HeadDrafts()), _document(3)[0][:6].tolist()
    for seed, temperature in ((1, 0.0), (2, 1.0), (3, 1.0)):
        sampling = Sampling(seed=seed, temperature=temperature)
        plain, drafted = (engine.generate(prefix, sampling, 40, speculative).tokens for speculative in (False, True))
        require(plain == drafted, f"speculation changes the output (temperature {temperature}, seed {seed})")


def check_vectors(config: HeadConfig) -> None:
    """Holds a head to drafting behind a prompt with vectors as it was trained, whatever it reads in their place.

    Raises:
        ConformanceError: says by how much it differs.
    """
    layout = VocabLayout(LAYOUT.text, (*LAYOUT.media, MediaEntry(Modality.IMAGE, "features")), LAYOUT.max_dim)
    torch.manual_seed(0)
    model = UnifiedModel.Config(layout=layout, backbone=BACKBONE, head=config, feature_width=6).build().eval()
    for weight in (model.embedding.table.weight, model.embedding.features.layers[0].weight):
        torch.nn.init.normal_(weight, std=0.3)
    picture = Segment(Modality.IMAGE, features=torch.randn(2, 3, 6), target=False)
    words = Segment(Modality.TEXT, torch.arange(4), target=False)
    document = encode_document(layout, (Turn("user", (picture, words)), Turn("assistant", (words,))))
    prefix = document.tokens.tolist()[:-4]
    drafted: list[Tensor] = []
    draft = model.head.draft

    def spy(depth: int, *given: Any) -> Any:
        found = draft(depth, *given)
        if depth == 1:
            drafted.append(found[1])
        return found

    with torch.no_grad():
        vectors = model.embedding.connect(document.features)
        model.head.draft = spy
        generation = Engine(model, draft_cost=0, drafts=HeadDrafts()).generate(prefix, Sampling(temperature=0.0), 4, vectors=vectors)
        del model.head.draft
        tokens = torch.tensor(generation.tokens)
        info = StreamGrammar(layout).analyse(tokens)
        batch = Batch(
            tokens=tokens[None],
            positions=torch.from_numpy(info.positions).long()[None],
            document_ids=torch.zeros(1, len(tokens), dtype=torch.long),
            slots=torch.from_numpy(info.slots).long()[None],
            loss_mask=torch.zeros(1, len(tokens), dtype=torch.bool),
            features=document.features,
            feature_index=(tokens == Special.FEATURE).nonzero()[:, 0],
        )
        wanted = model(batch)[1][0, : len(prefix)]
    found = drafted[0][0, : len(prefix)]
    if not model.head.num_caches:  # the newest anchor alone
        found, wanted = found[:1], wanted[-1:]
    worst = float((found - wanted).abs().max())
    require(worst < 1e-4, f"offset +1: behind vectors, drafting differs from training by {worst:.2g}")


def _document(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    question = Segment(Modality.TEXT, torch.randint(0, 50, (3 + seed % 4,), generator=generator), target=False)
    picture = Segment(Modality.IMAGE, torch.randint(0, 40, (1, 3, 4), generator=generator))
    words = Segment(Modality.TEXT, torch.randint(0, 50, (4,), generator=generator))
    encoded = encode_document(LAYOUT, (Turn("user", (question,)), Turn("assistant", (picture, words))))
    return encoded.tokens, encoded.target_mask


def example_batch(count: int) -> Batch:
    return collate([_document(i) for i in range(count)], StreamGrammar(LAYOUT), 80)
