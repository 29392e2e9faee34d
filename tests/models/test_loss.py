import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtp.config import ConfigError
from mmtp.models.heads.base import BELOW
from mmtp.models.loss import LossConfig, plan_targets, unified_loss
from mmtp.nn.attention import gather
from mmtp.nn.memory import PeakMemory
from mmtp.stream.packing import collate
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import MediaEntry, VocabLayout
from mmtp.types import Batch, Modality, Segment
from tests.models.common import GRAMMAR, LAYOUT, batch, model


def blackboard_loss(states: list[Tensor], unembedding: Tensor, packed: Batch, layout: VocabLayout, config: LossConfig) -> Tensor:
    """The loss as one would write it down, target by target, with all logits in memory."""
    total = unembedding.new_zeros(())
    for offset, state in enumerate(states):
        weight = unembedding.detach() if offset and config.detach else unembedding
        rows = []
        for b in range(packed.tokens.shape[0]):
            for t in range(packed.tokens.shape[1] - offset - 1):
                goal = t + offset + 1
                slot = layout.slots[int(packed.slots[b, goal])]
                predicted = packed.loss_mask[b, goal] or slot.modality in config.inputs
                if packed.document_ids[b, t] != packed.document_ids[b, goal] or not predicted or slot.size == 1:
                    continue
                ids = torch.tensor([i for lo, hi in slot.generable for i in range(lo, hi)])
                logits = weight[ids] @ state[b, t]
                cost = F.cross_entropy(logits, (ids == packed.tokens[b, goal]).nonzero()[0, 0])
                if offset:
                    own = (weight[ids] @ states[0][b, t + offset]).detach().softmax(0)
                    cost = (1 - config.mtp_distill) * cost + config.mtp_distill * (own * (own.log() - logits.log_softmax(0))).sum()
                rows.append((slot.modality, cost, logits.logsumexp(0)))
        for modality in {m for m, _, _ in rows}:
            losses = [ce for m, ce, _ in rows if m is modality]
            scale = config.modality_weights.get(modality, 1.0) * (config.mtp_weight * config.mtp_decay**offset if offset else 1.0)
            total = total + scale * torch.stack(losses).mean()
        total = total + config.z_weight * torch.stack([z for _, _, z in rows]).square().mean()
    return total


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("chunk_rows", [7, 1024])
@pytest.mark.parametrize("inputs", [(), ("image",)])
@pytest.mark.parametrize("distill", [0.0, 0.3])
def test_equals_the_blackboard_in_value_and_gradients(detach: bool, chunk_rows: int, inputs: tuple[str, ...], distill: float) -> None:
    config = LossConfig(
        modality_weights={"image": 0.5}, mtp_distill=distill, z_weight=0.01, inputs=inputs, detach=detach, chunk_rows=chunk_rows
    )
    packed = batch(3, 80)
    packed.loss_mask[:, ::3] = False
    weight = torch.randn(LAYOUT.size, 16, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(*packed.tokens.shape, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    wanted = blackboard_loss(states, weight, packed, LAYOUT, config)
    wanted_grads = torch.autograd.grad(wanted * 3, [weight, *states])
    found = unified_loss(states, weight, packed, LAYOUT, config).total
    found_grads = torch.autograd.grad(found * 3, [weight, *states])
    # Softmax runs in float32 whatever the weights are.
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_a_model_that_knows_nothing_costs_what_chance_costs() -> None:
    packed = batch(3, 80)
    output = unified_loss([torch.randn(*packed.tokens.shape, 16)] * 2, torch.zeros(LAYOUT.size, 16), packed, LAYOUT, LossConfig())
    assert output.chance.keys() == output.sums.keys()
    for key, chance in output.chance.items():
        assert output.sums[key] == pytest.approx(chance, rel=1e-5)


def test_inputs_are_predicted_where_the_recipe_says_so() -> None:
    packed = batch(3, 80)
    packed.loss_mask[0] = False
    states = [torch.randn(*packed.tokens.shape, 16)]
    weight = torch.randn(LAYOUT.size, 16)
    few, many = (unified_loss(states, weight, packed, LAYOUT, LossConfig(inputs=inputs)).counts for inputs in ((), ("image",)))
    codes = packed.slots == GRAMMAR.layout.slot_index["image.codes.0"]
    assert many[Modality.IMAGE, 0] == int(codes.sum()) > few[Modality.IMAGE, 0] > 0
    assert many[Modality.TEXT, 0] == few[Modality.TEXT, 0]


def test_drafts_that_give_the_own_distribution_cost_nothing() -> None:
    """Row t of offset k is to say what row t + k of offset 0 says; nothing of that goes back into the latter."""
    packed = batch(3, 80)
    own = torch.randn(*packed.tokens.shape, 16, requires_grad=True)
    drafts = [own.detach().roll(-k, 1).requires_grad_() for k in (1, 2)]
    weight = torch.randn(LAYOUT.size, 16)
    output = unified_loss([own, *drafts], weight, packed, LAYOUT, LossConfig(mtp_distill=1.0, z_weight=0.0))
    alone = unified_loss([own], weight, packed, LAYOUT, LossConfig(z_weight=0.0))
    assert output.overlap.keys() == {key for key in output.counts if key[1]}
    for key, overlap in output.overlap.items():
        assert overlap == pytest.approx(output.counts[key], rel=1e-5)
        assert output.divergence[key] == pytest.approx(0, abs=1e-3)
    gradients = torch.autograd.grad(output.total, [own, *drafts])
    assert torch.equal(gradients[0], torch.autograd.grad(alone.total, own)[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_anchors_leave_the_next_token_alone_and_drafts_to_those_that_were_drawn() -> None:
    packed = batch(3, 80)
    weight, states = torch.randn(LAYOUT.size, 16), [torch.randn(*packed.tokens.shape, 16, requires_grad=True) for _ in range(3)]
    config = LossConfig(mtp_anchors=0.25)
    anchors = config.draw_anchors(packed)
    assert anchors is not None and anchors.shape == (packed.tokens.shape[0], 20)
    assert (anchors.diff(dim=1) > 0).all()
    some = [states[0], *(gather(state, anchors) for state in states[1:])]
    found = unified_loss(some, weight, packed, LAYOUT, config, anchors=anchors)
    whole = unified_loss(states, weight, packed, LAYOUT, config)
    drawn = {(b, t) for b, row in enumerate(anchors.tolist()) for t in row}
    for key, count in whole.counts.items():
        if key[1] == 0:
            assert (found.counts[key], found.sums[key]) == (count, pytest.approx(whole.sums[key]))
    (all_grads, some_grads) = (torch.autograd.grad(o.total, states[1]) for o in (whole, found))
    touched = {tuple(place) for place in some_grads[0].abs().sum(2).nonzero().tolist()}
    assert touched == drawn & {tuple(place) for place in all_grads[0].abs().sum(2).nonzero().tolist()}
    assert sum(found.counts[key] for key in found.counts if key[1] == 1) == len(touched) > 0


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_of_anchors_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="mtp_anchors .* is a share"):
        LossConfig(mtp_anchors=share)


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_drafts_learn_the_own_distribution_where_the_data_leave_a_doubt(distill: float) -> None:
    """Eight answers to one question: no draft can know which comes, but what the model itself would say it can."""
    documents = []
    for word in range(8):
        question = Segment(Modality.TEXT, torch.tensor([3, 1, 4, 1]), target=False)
        answer = Segment(Modality.TEXT, torch.tensor([5, 9, word]))
        encoded = encode_document(LAYOUT, (Turn("user", (question,)), Turn("assistant", (answer,))))
        documents.append((encoded.tokens, encoded.target_mask))
    packed = collate(documents, GRAMMAR, 64)
    net = model(depth=1)
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=1e-2, weight_decay=0.0)
    before = net.loss(packed, LossConfig(mtp_distill=1.0))
    for _ in range(60):
        optimizer.zero_grad()
        net.loss(packed, LossConfig(mtp_weight=1.0, mtp_distill=distill)).total.backward()
        optimizer.step()
    after, key = net.loss(packed, LossConfig(mtp_distill=1.0)), (Modality.TEXT, 1)
    count = after.counts[key]
    doubt = 8 * math.log(8)  # of eight last words, summed
    assert after.sums[key] > 0.9 * doubt
    if distill:
        assert after.divergence[key] / count < 0.01 < before.divergence[key] / count
        assert after.overlap[key] / count > 0.95
    else:
        assert after.divergence[key] / count > 0.5
        assert after.sums[key] < 1.2 * doubt


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(ConfigError, match=f"mtp_distill {share} is a share"):
        LossConfig(mtp_distill=share)


@pytest.mark.parametrize("wrong", [{"inputs": ("picture",)}, {"modality_weights": {"picture": 1.0}}])
def test_unknown_modalities_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'picture' is no modality; there are text, image"):
        LossConfig(**wrong)


def test_counts_every_choice_once_and_leaves_out_what_is_forced() -> None:
    packed = batch(3, 80)
    output = model(depth=2).loss(packed, LossConfig())
    slots = packed.slots[packed.loss_mask]
    free = torch.tensor([LAYOUT.slots[i].size > 1 for i in slots.tolist()])
    assert sum(n for (_, k), n in output.counts.items() if k == 0) == int(free.sum())
    codes = int((slots == GRAMMAR.layout.slot_index["image.codes.0"]).sum())
    assert output.counts[Modality.IMAGE, 0] == codes
    assert 0 <= output.correct[Modality.IMAGE, 0] <= codes
    assert output.counts[Modality.TEXT, 2] < output.counts[Modality.TEXT, 0] + 1


def test_gradients_are_told_by_modality_and_offset() -> None:
    packed = batch(3, 80)
    weight, states = torch.randn(LAYOUT.size, 16), [torch.randn(*packed.tokens.shape, 16, requires_grad=True) for _ in range(2)]
    config = LossConfig(modality_weights={"image": 0.5}, z_weight=0)
    output = unified_loss(states, weight, packed, LAYOUT, config)
    assert output.grads.keys() == output.sums.keys()
    for (modality, offset), found in output.grads.items():
        alone = unified_loss(states, weight, packed, LAYOUT, dataclasses.replace(config, modality_weights=dict.fromkeys(Modality, 0.0) | {
            modality: config.modality_weights.get(modality, 1.0)
        }))  # fmt: skip
        (gradient,) = torch.autograd.grad(alone.total, states[offset])
        assert found == pytest.approx(gradient.norm().item(), rel=1e-5)
    frozen = [states[0].detach(), states[1]]
    assert {offset for _, offset in unified_loss(frozen, weight, packed, LAYOUT, config).grads} == {1}


def test_the_last_state_predicts_the_row_below_where_there_is_one() -> None:
    packed = batch(3, 80)
    weight, states = torch.randn(LAYOUT.size, 16), [torch.randn(*packed.tokens.shape, 16, requires_grad=True) for _ in range(3)]
    config = LossConfig(z_weight=0)
    output = unified_loss(states, weight, packed, LAYOUT, config, vertical=True)
    low, high = LAYOUT.code_range(Modality.IMAGE, 0)
    wanted = []
    for b, document in {(b, d) for b, row in enumerate(packed.document_ids.tolist()) for d in row if d >= 0}:
        tokens = [packed.tokens[b, t] for t in (packed.document_ids[b] == document).nonzero()[:, 0].tolist()]
        start = int((packed.document_ids[b] == document).nonzero()[0])
        (span,) = GRAMMAR.spans(torch.stack(tokens))
        height, width = span.grid
        for place in range(span.body_start, span.body_start + (height - 1) * width):
            logits = states[-1][b, start + place] @ weight[low:high].T
            wanted.append(F.cross_entropy(logits, tokens[place + width] - low))
    assert {key for key in output.counts if key[1] == BELOW} == {(Modality.IMAGE, BELOW)}
    assert output.counts[Modality.IMAGE, BELOW] == len(wanted) == 3 * 2 * 4
    assert output.sums[Modality.IMAGE, BELOW] == pytest.approx(torch.stack(wanted).sum().item(), rel=1e-5)
    found = torch.autograd.grad(output.total, states[-1])[0]
    (mine,) = torch.autograd.grad(config.mtp_weight * config.mtp_decay * torch.stack(wanted).mean(), states[-1])
    torch.testing.assert_close(found, mine, atol=1e-4 * float(mine.abs().max()), rtol=1e-3)
    assert set(unified_loss(states[:2], weight, packed, LAYOUT, LossConfig()).counts.values()) <= set(output.counts.values())


def test_no_target_lies_in_another_document() -> None:
    packed = batch(4, 80)
    for item in plan_targets(packed, LAYOUT, range(4)):
        rows = item.rows // packed.tokens.shape[1], item.rows % packed.tokens.shape[1]
        goals = rows[0], rows[1] + item.offset + 1
        assert (packed.document_ids[rows] == packed.document_ids[goals]).all()
        assert packed.loss_mask[goals].all()


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_peak_memory_does_not_grow_with_the_number_of_heads(distill: float) -> None:
    layout = VocabLayout(LAYOUT.text, (MediaEntry(Modality.IMAGE, "many", codebook_sizes=(4000,)),), 16)
    packed = batch(8, 160, grid=(8, 8))
    weight = torch.randn(layout.size, 8, requires_grad=True)

    def peak(offsets: int) -> int:
        states = [torch.randn(*packed.tokens.shape, 8, requires_grad=True) for _ in range(offsets)]
        with PeakMemory() as memory:
            config = LossConfig(chunk_rows=64, detach=False, mtp_distill=distill)
            unified_loss(states, weight, packed, layout, config).total.backward()
        weight.grad = None
        return memory.peak

    logits = int((packed.slots == layout.slot_index["image.codes.0"]).sum()) * 4000 * 4
    one, five = peak(2 if distill else 1), peak(5)  # the first draft brings its target's logits, a chunk of them
    assert one < logits, f"{one} bytes for one head, whose logits would be {logits}"
    assert five - one < 0.05 * logits, f"{five - one} bytes more for four more heads; the logits of one are {logits}"
