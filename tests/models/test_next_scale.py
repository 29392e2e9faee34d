"""Pictures written scale by scale: what queries hold, what may depend on what, the loss, and decoding."""

import dataclasses
from itertools import accumulate

import numpy as np
import pytest
import torch

from mmtp.config import ConfigError
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.loss import LossConfig
from mmtp.models.next_scale import NextScale, NextScaleConfig
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.tokenizers.quantizers import MultiScaleVQ
from mmtp.types import Batch, Modality, Segment
from tests.models.common import BACKBONE

SCALES = (1, 2, 3)
ENDS = tuple(accumulate(n * n for n in SCALES))
CELLS = ENDS[-1]
LAYOUT = VocabLayout(TextEntry("words", 50), (MediaEntry(Modality.IMAGE, "pyramids", codebook_sizes=(40,)),), 16)
GRAMMAR = StreamGrammar(LAYOUT)
PYRAMID = NextScaleConfig(scales=SCALES, codebook_dim=4, convolutions=2)
FIRST = LAYOUT.code_range(Modality.IMAGE)[0]


def writer(depth: int = 0, **changes: object) -> UnifiedModel:
    """A tiny model with large embeddings, and a random codebook."""
    torch.manual_seed(0)
    head = {"head": SequentialHead.Config(mtp_depth=depth)} if depth else {}
    config = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, next_scale=PYRAMID, **head)
    net = dataclasses.replace(config, **changes).build()
    for weights in (net.embedding.table.weight, net.next_scale.cells.weight, net.next_scale.project.weight):
        torch.nn.init.normal_(weights, std=0.3)
    for name in ("codebook", "kernels", "biases"):
        torch.nn.init.normal_(getattr(net.next_scale, name))
    return net


def drawing(seed: int, cells: int = CELLS, shown: bool = False, rows: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Words, with a picture that is only read where ``shown``; then the assistant's picture, and its words."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 40, (2, 1, rows, cells), generator=generator)
    words = Segment(Modality.TEXT, torch.randint(0, 50, (3 + seed,), generator=generator), target=False)
    read = (Segment(Modality.IMAGE, codes[1], target=False),) if shown else ()
    answer = (Segment(Modality.IMAGE, codes[0]), Segment(Modality.TEXT, torch.randint(0, 50, (4,), generator=generator)))
    document = encode_document(LAYOUT, (Turn("user", (*read, words)), Turn("assistant", answer)))
    return document.tokens, document.target_mask


def body(batch: Batch, row: int = 0, picture: int = -1) -> list[int]:
    """Places of a picture's codes."""
    places = (batch.slots[row] == LAYOUT.slot_index["image.codes.0"]).nonzero()[:, 0].tolist()
    begins = [p for p in places if p - 1 not in places]
    begin = begins[picture]
    return [p for p in places if p >= begin and (begins[-1] == begin or p < begins[begins.index(begin) + 1])]


def moved(net: UnifiedModel, batch: Batch, place: int) -> set[int]:
    """Places whose prediction moves with one token."""
    changed = batch.tokens.clone()
    changed[0, place] = FIRST + (changed[0, place] - FIRST + 1) % 40
    with torch.no_grad():
        before, after = net(batch)[0], net(dataclasses.replace(batch, tokens=changed))[0]
    return {p + 1 for p in (before != after).any(-1)[0].nonzero()[:, 0].tolist()}


def test_queries_hold_what_the_quantizer_has_said_so_far() -> None:
    quantizer = MultiScaleVQ(MultiScaleVQ.Config(scales=SCALES, codebook_size=40, codebook_dim=4, convolutions=2), dim=4).eval()
    pyramid = NextScale(PYRAMID, LAYOUT, 8)
    with torch.no_grad():
        quantizer.project_out.weight.copy_(torch.eye(4))
        quantizer.project_out.bias.zero_()
        pyramid.take(quantizer.vq.codebook, quantizer.smooth)
    codes = torch.randint(0, 40, (2, CELLS))
    held = list(pyramid.coarser(codes[:, : ENDS[-2]]))
    assert not held[0].any() and [h.shape for h in held] == [(2, n * n, 4) for n in SCALES]
    for scale, end, found in zip(SCALES[1:], ENDS, held[1:], strict=False):
        picture = quantizer.lookup(codes[:, :end, None]).transpose(1, 2).unflatten(2, (3, 3))
        wanted = torch.nn.functional.interpolate(picture, size=(scale, scale), mode="area").flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_code_depends_on_the_scales_before_it_and_words_on_all_codes() -> None:
    net, batch = writer().eval(), collate([drawing(0)], GRAMMAR, 60)
    places = body(batch)
    end = int((batch.document_ids[0] >= 0).sum())
    for i, place in enumerate(places):
        scale = next(k for k, last in enumerate(ENDS) if i < last)
        later = set(places[ENDS[scale] :])
        assert moved(net, batch, place) == later | set(range(places[-1] + 1, end + 1))
    word = places[0] - 6
    assert moved(net, batch, word) >= set(places)
    for i in range(CELLS):  # queries of a scale see each other: a prediction hangs on where its neighbours are
        scale = next(k for k, last in enumerate(ENDS) if i < last)
        before = net(batch)[0]
        with torch.no_grad():
            net.next_scale.cells.weight[i] += 1
            after = net(batch)[0]
            net.next_scale.cells.weight[i] -= 1
        found = {p + 1 for p in ((before - after).abs() > 1e-5).any(-1)[0].nonzero()[:, 0].tolist()}
        assert found == set(places[ENDS[scale] - SCALES[scale] ** 2 : ENDS[scale]])


def test_pictures_that_are_read_are_read_as_ever() -> None:
    net, batch = writer().eval(), collate([drawing(0, shown=True)], GRAMMAR, 80)
    read, words = body(batch, picture=0), slice(0, body(batch)[0] - 1)
    plain = UnifiedModel(dataclasses.replace(net.config, next_scale=None)).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("next_scale.")})
    with torch.no_grad():
        torch.testing.assert_close(net(batch)[0][:, words], plain(batch)[0][:, words], atol=1e-5, rtol=0)
        asked = net(batch, predicted=torch.ones_like(batch.loss_mask))[0]
    assert (asked - net(batch)[0]).abs().amax(-1)[0].gt(1e-3).nonzero()[:, 0].tolist() == [p - 1 for p in read]


def test_documents_of_a_row_are_as_if_alone() -> None:
    net = writer(depth=2).eval()
    documents = [drawing(0, shown=True), drawing(1, ENDS[1]), drawing(2, 7), drawing(3, 7, rows=2)]  # the last two are no pyramids
    packed = collate(documents, GRAMMAR, 160)
    assert len(packed.tokens) == 1
    assert len(net.next_scale.queries(packed, packed.loss_mask).at) == CELLS + ENDS[1]
    with torch.no_grad():
        together, start = net(packed), 0
        for document in documents:
            size = len(document[0])
            alone = net(collate([document], GRAMMAR, size))
            for offset, (one, all_) in enumerate(zip(alone, together, strict=True)):
                torch.testing.assert_close(all_[:, start : start + size - offset], one[:, : size - offset], atol=1e-5, rtol=1e-4)
            start += size


def test_the_loss_is_that_of_every_code_at_its_own_place() -> None:
    net = writer(depth=1)
    batch = collate([drawing(0, shown=True), drawing(1), drawing(2)], GRAMMAR, 80)
    output = net.loss(batch, LossConfig(z_weight=0.0))
    states = net(batch)[0]
    low, high = LAYOUT.code_range(Modality.IMAGE)
    total = 0.0
    for row in range(len(batch.tokens)):
        for place in (batch.loss_mask[row] & (batch.slots[row] == LAYOUT.slot_index["image.codes.0"])).nonzero()[:, 0].tolist():
            logits = states[row, place - 1] @ net.unembedding.weight[low:high].T
            total -= logits.log_softmax(0)[batch.tokens[row, place] - low].item()
    assert output.counts[Modality.IMAGE, 0] == 3 * CELLS
    assert output.sums[Modality.IMAGE, 0] == pytest.approx(total, rel=1e-4)
    assert (Modality.IMAGE, 1) not in output.counts and output.counts[Modality.TEXT, 1]
    output.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in net.next_scale.parameters())
    with_inputs = net.loss(batch, LossConfig(inputs=("image",)))
    assert with_inputs.counts[Modality.IMAGE, 0] == 4 * CELLS


def test_rows_without_pictures_leave_every_weight_a_gradient() -> None:
    net = writer()
    words = encode_document(LAYOUT, (Segment(Modality.TEXT, torch.arange(9)),))
    net.loss(collate([(words.tokens, words.target_mask)], GRAMMAR, 20), LossConfig()).total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.next_scale.parameters())


def test_the_pyramid_is_saved_with_the_model_and_the_vocabulary_knows_nothing_of_it(tmp_path) -> None:
    net, batch = writer().eval(), collate([drawing(0)], GRAMMAR, 60)
    again = from_pretrained(save_pretrained(net, tmp_path))
    assert again.config == net.config and torch.equal(again(batch)[0], net(batch)[0])
    assert {"codebook", "kernels", "biases"} == {name for name, _ in again.next_scale.named_buffers()}
    assert again.config.layout.hash == LAYOUT.hash
    assert all(not name.startswith("next_scale") for name in UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE).build().state_dict())


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ((), "no codes of pictures"),
        ((MediaEntry(Modality.IMAGE, "p", codebook_sizes=(4, 4)),), "the vocabulary has 2 codebooks of pictures"),
    ],
)
def test_vocabularies_without_a_pyramid_are_refused(media: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UnifiedModel.Config(layout=VocabLayout(LAYOUT.text, media), backbone=BACKBONE, next_scale=PYRAMID).build()
    with pytest.raises(ConfigError, match="next_scale: queries do not read vectors by cross-attention"):
        writer(backbone=dataclasses.replace(BACKBONE, cross_attention_every=1))
    with pytest.raises(ConfigError, match=r"scales \[2, 2\]"):
        NextScaleConfig.from_dict({"scales": [2, 2], "codebook_dim": 4, "convolutions": 1})
