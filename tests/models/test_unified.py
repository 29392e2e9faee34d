import dataclasses

import pytest
import torch

from mmtp.models.embed import FeatureError
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel, input_spans
from mmtp.stream.vocab import Special
from mmtp.types import Batch, Modality
from tests.models.common import BACKBONE, VECTORS, batch, model


def replaced(old: Batch, **changes: object) -> Batch:
    return dataclasses.replace(old, **changes)


def test_no_offset_sees_further_than_it_may() -> None:
    net, packed = model(depth=3).eval(), batch(1, 64)
    length = int((packed.document_ids[0] == 0).sum())
    clean = net(packed)
    for moved in range(4, length, 3):
        tokens = packed.tokens.clone()
        tokens[0, moved] = (tokens[0, moved] + 1) % 30
        for offset, (before, after) in enumerate(zip(clean, net(replaced(packed, tokens=tokens)), strict=True)):
            same = (before == after).all(-1)[0]
            first = moved - offset  # state k at t reads x[<=t+k]
            assert same[:first].all(), f"offset {offset} at {first - 1} or before moved with token {moved}"
            assert not same[first], f"offset {offset} at {first} does not read token {moved}"


def test_documents_of_a_row_do_not_see_each_other() -> None:
    net, packed = model(depth=2).eval(), batch(3, 80)
    row = int((packed.document_ids.amax(1) > 0).nonzero()[0])
    tokens = packed.tokens.clone()
    first = packed.document_ids[row] == packed.document_ids[row].clamp(min=0).amin()
    tokens[row, first.nonzero()[2]] = 20
    for offset, (before, after) in enumerate(zip(net(packed), net(replaced(packed, tokens=tokens)), strict=True)):
        other = (packed.document_ids[row] != packed.document_ids[row, 0]) & (packed.document_ids[row] >= 0)
        assert (before[row][other] == after[row][other]).all(), f"offset {offset}"


def test_detached_heads_leave_the_backbone_as_next_token_training_does() -> None:
    packed = batch()
    net = model(depth=2)
    plain = model(depth=0)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("head.")})
    net.loss(packed, LossConfig(detach=True, mtp_weight=1.0)).total.backward()
    plain.loss(packed, LossConfig()).total.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(net.named_parameters())[name].grad, parameter.grad, atol=1e-7, rtol=1e-5, msg=name)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.head.parameters())
    joint = model(depth=2)
    joint.loss(packed, LossConfig(detach=False, mtp_weight=1.0)).total.backward()
    assert not torch.allclose(joint.backbone.blocks[0].mlp.down.weight.grad, net.backbone.blocks[0].mlp.down.weight.grad, rtol=1e-3)


def test_inputs_of_a_medium_are_left_out_in_training_alone() -> None:
    net, packed = model(depth=2).eval(), batch(4, 120)
    whole = net.embedding.batch(packed)
    net.input_dropout = {"image": 0.5}
    assert torch.equal(net._thinned(packed, whole), whole)
    torch.manual_seed(0)
    left_out = (net.train()._thinned(packed, whole) == 0).all(-1)
    pictures = net.slot_modality[packed.slots] == Modality.IMAGE.index
    assert not left_out[~pictures].any()
    assert 0.35 < left_out[pictures].float().mean() < 0.65 and pictures.sum() > 50
    assert not torch.equal(net(packed)[0], net.eval()(packed)[0])


def test_overfits_a_handful_of_documents_at_every_offset() -> None:
    net, packed = model(depth=2), batch(2, 60)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        output = net.loss(packed, LossConfig(mtp_weight=1.0))
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
    for key, total in output.sums.items():
        assert total / output.counts[key] < 0.1, key


def test_configuration_survives_a_round_trip() -> None:
    config = model(depth=3).config
    assert UnifiedModel.Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_unembedding(tied: bool) -> None:
    net = model(depth=0, tie_embeddings=tied)
    assert (net.unembedding.weight is net.embedding.table.weight) == tied
    assert net(batch())[0].shape[-1] == net.unembedding.weight.shape[1]


def with_vectors() -> Batch:
    """Ten places of which five are for vectors, in two spans."""
    slots = torch.zeros(1, 10, dtype=torch.long)
    slots[0, 3:6] = slots[0, 7:9] = VECTORS.slot_index["feature.codes.0"]
    return Batch(
        tokens=torch.where(slots == 0, 40, int(Special.FEATURE)),
        positions=torch.arange(10)[None, :, None].expand(1, 10, 3),
        document_ids=torch.zeros(1, 10, dtype=torch.long),
        slots=slots,
        loss_mask=torch.zeros(1, 10, dtype=torch.bool),
        features=torch.randn(5, 5),
        feature_index=torch.tensor([3, 4, 5, 7, 8]),
    )


@pytest.mark.parametrize("continuous", ["placeholder", "embeddings", "masked"])
def test_heads_learn_what_stands_for_vectors_even_where_they_are_detached(continuous: str) -> None:
    head = SequentialHead.Config(mtp_depth=2, continuous=continuous)
    net = UnifiedModel.Config(layout=VECTORS, backbone=BACKBONE, head=head, feature_width=5).build()
    for detach in (True, False):
        net.zero_grad()
        sum(state[:, :-2].sum() for state in net(with_vectors(), detach=detach)[1:]).backward()
        table, vectors = net.embedding.table.weight.grad, net.embedding.features.layers[0].weight.grad
        learnt = [] if table is None else table.any(1).nonzero()[:, 0].tolist()
        assert (int(Special.FEATURE) in learnt) == (continuous != "embeddings")
        assert (40 in learnt) != detach and (vectors is not None and bool(vectors.any())) != detach


def test_continuous_features_enter_at_their_places_and_see_each_other() -> None:
    net = UnifiedModel.Config(layout=VECTORS, backbone=BACKBONE, feature_width=5).build().eval()
    packed = with_vectors()
    spans = input_spans(packed, VECTORS)
    assert spans is not None
    assert spans.tolist() == [[-1, -1, -1, 1, 1, 1, -1, 2, 2, -1]]
    clean = net(packed)[0]
    assert packed.features is not None
    changed = packed.features.clone()
    changed[2] += 1  # the last of the first span
    moved = (net(replaced(packed, features=changed))[0] != clean).any(-1)[0].tolist()
    assert moved == [False, False, False, True, True, True, True, True, True, True]
    with pytest.raises(FeatureError, match="features are 4 wide, the model's feature_width is 5"):
        net(replaced(packed, features=torch.randn(5, 4)))
    with pytest.raises(FeatureError, match="feature_width is 0"):
        UnifiedModel.Config(layout=VECTORS, backbone=BACKBONE).build()(packed)
