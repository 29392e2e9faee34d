"""Media with weights of their own: each medium's touch its positions alone, attention is over all, copies compute what one did.

Cross-attention: what a position may read of pictures, and that it learns to.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mmtp.config import ConfigError
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.models.backbone import OWN, upcycled
from mmtp.models.heads.next import NextHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel, input_spans
from mmtp.nn.attention import document_mask
from mmtp.nn.windows import Windows
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import Turn, encode_document
from mmtp.types import Batch, Modality, Segment
from tests.models import test_next_scale, test_writing
from tests.models.common import BACKBONE, GRAMMAR, LAYOUT, VECTORS, asked, batch, document, model, opened, reader

CHOICES = OWN[1:]


def mixed(own: str, **changes: object) -> UnifiedModel:
    """A tiny model whose media have weights of their own, which differ in norms as well."""
    torch.manual_seed(0)
    backbone = dataclasses.replace(BACKBONE, modality_specific=own)
    head = SynchronizedHead.Config(mtp_depth=2)
    net = UnifiedModel.Config(layout=LAYOUT, backbone=backbone, head=head, **changes).build()
    torch.nn.init.normal_(net.embedding.table.weight, std=0.3)
    for name, weight in net.named_parameters():
        if "_norm." in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return net


@pytest.mark.parametrize("own", CHOICES)
def test_copies_compute_what_the_common_weights_did(own: str, tmp_path) -> None:
    dense, net, packed = model(depth=0).eval(), mixed(own).eval(), batch()
    names = [name for name in net.state_dict() if name.startswith("backbone.")]
    copied = upcycled(dense.state_dict(), names)
    assert list(copied) == names
    net.load_state_dict(net.state_dict() | copied | {"embedding.table.weight": dense.embedding.table.weight})
    with torch.no_grad():
        torch.testing.assert_close(net(packed, drafts=False)[0], dense(packed)[0], atol=1e-5, rtol=1e-4)
    save_pretrained(net, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config == net.config and all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("own", CHOICES)
@pytest.mark.parametrize("medium", [Modality.TEXT, Modality.IMAGE])
def test_weights_of_a_medium_touch_its_positions_first(own: str, medium: Modality) -> None:
    """Of the last block, no position sees what another one has become there, except by keys and values."""
    net, packed = mixed(own).eval(), batch(1, 64)
    kinds = net.slot_modality[packed.slots][0] == medium.index
    with torch.no_grad():
        before = net(packed, drafts=False)[0][0]
        for name, weight in net.backbone.blocks[-1].named_parameters():
            if f"{medium}" in name.split(".") and "mlp" in name:
                weight += 0.1
        after = net(packed, drafts=False)[0][0]
    assert ((before != after).any(-1) == kinds).all() and kinds.any() and not kinds.all()


def test_one_medium_sees_the_other() -> None:
    net, packed = mixed("all").eval(), batch(1, 64)
    kinds = net.slot_modality[packed.slots][0]
    place = int((kinds == Modality.IMAGE.index).nonzero()[2])
    tokens = packed.tokens.clone()
    tokens[0, place] += 1
    before, after = net(packed, drafts=False)[0][0], net(dataclasses.replace(packed, tokens=tokens), drafts=False)[0][0]
    moved = (before != after).any(-1)
    assert not moved[:place].any() and moved[place:][packed.document_ids[0, place:] == 0].all()
    assert (kinds[moved] == Modality.TEXT.index).any()


@pytest.mark.parametrize("own", CHOICES)
def test_documents_of_a_row_stay_apart(own: str) -> None:
    net = mixed(own).eval()
    together = collate([document(0), document(1)], GRAMMAR, 80)
    assert len(together.tokens) == 1
    with torch.no_grad():
        packed = net(together)[0][0]
        for i, alone in enumerate([collate([document(i)], GRAMMAR, 40) for i in range(2)]):
            own_states = net(alone)[0][0][alone.document_ids[0] == 0]
            torch.testing.assert_close(packed[together.document_ids[0] == i], own_states, atol=1e-5, rtol=1e-4)


def test_every_weight_has_a_gradient_where_a_batch_lacks_a_medium() -> None:
    net, packed = mixed("all"), batch(1, 64)
    words = dataclasses.replace(packed, slots=torch.zeros_like(packed.slots), loss_mask=torch.zeros_like(packed.loss_mask))
    net(words, drafts=False)[0].sum().backward()
    assert net.backbone.blocks[0].mlp["image"].down.weight.grad.eq(0).all()
    assert net.backbone.blocks[0].mlp["text"].down.weight.grad.any()


def test_overfits_a_handful_of_documents() -> None:
    net, packed = mixed("all"), batch(2, 60)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        output = net.loss(packed, LossConfig(mtp_weight=1.0))
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
    for key, total in output.sums.items():
        assert total / output.counts[key] < 0.1, key


def check_graph() -> None:
    net = mixed("all")
    batches = [collate([document(i, grid=(2 + i, 3))], GRAMMAR, 60) for i in range(3)]
    with torch.no_grad():
        wanted = [net(packed)[0] for packed in batches]
        counter = CompileCounter()
        net.compute_states = torch.compile(net.compute_states, dynamic=False, fullgraph=True, backend=counter)
        for packed, states in zip(batches, wanted, strict=True):
            torch.testing.assert_close(net(packed)[0], states)
    assert counter.frame_count == 1
    # Training: rows of many documents stand in windows, of other sizes in every batch.
    net, counter = model(), CompileCounter()
    batches = [collate([document(i, words=3 + n) for i in range(8)], GRAMMAR, 140) for n in range(3)]
    sizes = {windows.index.shape for packed in batches if (windows := Windows.of(packed.document_ids))}
    assert len(sizes) == len(batches)
    wanted = [gradients(net, packed) for packed in batches]
    net.compute_states = torch.compile(net.compute_states, dynamic=False, fullgraph=True, backend=counter)
    for packed, grads in zip(batches, wanted, strict=True):
        torch.testing.assert_close(gradients(net, packed), grads)
    assert counter.frame_count == 1


def gradients(net: UnifiedModel, packed: Batch) -> list[torch.Tensor]:
    """Of every weight."""
    return list(torch.autograd.grad(net.loss(packed, LossConfig()).total, list(net.parameters()), materialize_grads=True))


def test_rows_in_windows_learn_as_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    net, packed = model(), collate([document(i) for i in range(8)], GRAMMAR, 120)
    windows = Windows.of(packed.document_ids)
    assert windows is not None
    assert windows.index.shape[1] < packed.tokens.shape[1] / 2
    found = gradients(net, packed)
    monkeypatch.setattr(Windows, "of", lambda *_: None)
    torch.testing.assert_close(found, gradients(net, packed), atol=1e-6, rtol=1e-4)


def test_one_graph_serves_batches_of_any_mixture() -> None:
    """In a process of its own: the checkers of shapes that tests wrap around everything are nothing to trace."""
    argv = [sys.executable, "-c", "from tests.models.test_backbone import check_graph; check_graph()"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(argv, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_closed_gates_leave_the_model_as_it_is_without_cross_attention() -> None:
    net, packed = reader().eval(), collate([asked(0), asked(1)], StreamGrammar(VECTORS), 40)
    plain = reader(backbone=BACKBONE).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if ".cross." not in k})
    with torch.no_grad():
        embedded = plain.embedding(packed.tokens)
        documents, spans = packed.document_ids, input_spans(packed, VECTORS)
        without = plain.backbone(embedded, packed.positions, Windows.of(documents, spans) or document_mask(documents, spans))
        assert torch.equal(net(packed)[0], plain.backbone.norm(without))
        assert not torch.equal(opened(net)(packed)[0], plain.backbone.norm(without))


def test_positions_read_the_last_picture_of_their_document() -> None:
    net, packed = opened(reader()).eval(), collate([asked(0, pictures=2), asked(1)], StreamGrammar(VECTORS), 60)
    assert len(packed.tokens) == 1
    before = net(packed)
    for span in range(3):
        features = packed.features.clone()
        features[4 * span] = torch.randn(5)
        own, after = packed.document_ids[0, packed.feature_index[4 * span]], int(packed.feature_index[4 * span + 3]) + 1
        for offset, (one, other) in enumerate(zip(before, net(dataclasses.replace(packed, features=features)), strict=True)):
            moved = (one != other).any(-1)[0].nonzero()[:, 0]
            assert int(moved[0]) == after and (packed.document_ids[0, moved] == own).all(), offset
    seen = net._context(packed, net.embedding(packed.tokens)).mask[0, 0]
    last = int((packed.document_ids[0] == 0).nonzero()[-1])
    assert seen[last].nonzero()[:, 0].tolist() == packed.feature_index[4:8].tolist()


def test_it_learns_from_what_it_reads_and_opens_its_gates() -> None:
    """Prompts differ in their vectors alone. Batches without any leave no weight without a gradient."""
    net = reader(head=NextHead.Config())
    packed = collate([asked(i, answer=i) for i in range(4)], StreamGrammar(VECTORS), 40)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        output = net.loss(packed, LossConfig())
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
    assert output.sums[Modality.TEXT, 0] / output.counts[Modality.TEXT, 0] < 0.05
    assert all(float(block.attention_gate.detach().abs()) > 0.01 for block in net.backbone.cross)
    optimizer.zero_grad()
    words = encode_document(VECTORS, (Turn("assistant", (Segment(Modality.TEXT, torch.arange(5)),)),))
    net.loss(collate([(words.tokens, words.target_mask)], StreamGrammar(VECTORS), 40), LossConfig()).total.backward()
    assert all(weight.grad is not None for weight in net.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_width": 0}, "cross_attention_every is for models that read vectors"),
        ({"head": SequentialHead.Config(continuous="embeddings")}, "continuous = 'embeddings', but vectors that cross-attention reads"),
    ],
)
def test_cross_attention_to_nothing_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reader(**changes)
    with pytest.raises(ValueError, match="cross_attention_every 3: 0 to the depth, 2, is wanted"):
        dataclasses.replace(BACKBONE, cross_attention_every=3)


def test_a_window_beside_what_sees_all_is_refused() -> None:
    with pytest.raises(ValueError, match="window -1: 1 or more is wanted, or 0 for no limit"):
        dataclasses.replace(BACKBONE, window=-1)
    with pytest.raises(ValueError, match="leave out window or cross_attention_every"):
        dataclasses.replace(BACKBONE, window=4, cross_attention_every=1)
    near = dataclasses.replace(BACKBONE, window=4)
    with pytest.raises(ConfigError, match="backbone: what next_scale writes at once sees all before it; leave out window or next_scale"):
        test_next_scale.writer(backbone=near)
    with pytest.raises(ConfigError, match="leave out window or flow"):
        test_writing.writer(backbone=near, flow=test_writing.BLOCK)
    test_writing.writer(backbone=near)


def test_states_hang_on_the_window_of_every_block_alone() -> None:
    """In rows of several documents and of one, whichever way they attend."""
    torch.manual_seed(0)
    net = UnifiedModel.Config(
        layout=LAYOUT, backbone=dataclasses.replace(BACKBONE, window=4), head=SequentialHead.Config(mtp_depth=1)
    ).build()
    net.eval()
    for packed in (batch(1, 30), batch(6, 40)):
        document, place = int(packed.document_ids[0, 12]), 12
        changed = packed.tokens.clone()
        changed[0, place] = changed[0, place - 1]
        with torch.no_grad():
            before, after = (net(dataclasses.replace(packed, tokens=tokens)) for tokens in (packed.tokens, changed))
        moved = [(one != other).any(-1)[0].nonzero().flatten().tolist() for one, other in zip(before, after, strict=True)]
        last = int((packed.document_ids[0] == document).nonzero().max())
        assert moved[0] == list(range(place, min(last, place + 2 * 3) + 1))  # two blocks, each three positions further
        assert max(moved[1]) <= min(last, place + 3 * 3)
