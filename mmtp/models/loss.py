"""Cross-entropy over the grammar's vocabulary slices, for all offsets at once, in bounded memory.

At each position the grammar allows one set of ids (a slot), so logits are taken over that set alone: a picture's row of codes
costs the columns of its codebook, not the vocabulary. Rows go through the unembedding a chunk at a time, and each chunk's gradient
is taken at once (the method of Liger's fused linear cross-entropy, arXiv 2410.10989, section 3.2), so that neither ``offsets x
logits`` nor the logits of one offset are ever in memory.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

import mmtp.config
from mmtp.models.heads.base import BELOW
from mmtp.stream.rows import above
from mmtp.stream.vocab import VocabLayout
from mmtp.types import Batch, Modality


@dataclass(frozen=True, kw_only=True)
class LossConfig(mmtp.config.Config):
    """How the parts of the loss are weighed: sum over m of w_m [CE_m + beta sum_k decay^k D_{m,k}] + z mean(lse^2).

    D_{m,k} is (1 - a) CE_{m,k} + a KL_{m,k}, of which the first is against the data and the second against the model itself.

    Attributes:
        modality_weights: w_m of each *target* modality; 1 where none is given. Every CE is a mean over its own targets, so a
            medium with many tokens does not drown one with few.
        mtp_weight: beta, weight of the draft heads.
        mtp_decay: weight of offset k is ``mtp_decay ** k``; that of the row below is that of offset 1.
        mtp_distill: a, the share of a draft's loss in which its target is not the token of the data but the model's own next-token
            distribution at the place of that token, held fixed. Speculation accepts a draft with probability 1 - TV between the two
            distributions (Leviathan et al., arXiv 2211.17192, section 3), and this brings them together (DistillSpec, arXiv 2310.08461).
            Medusa (arXiv 2401.10774, section 2.3.2) and FastMTP (arXiv 2509.18362) let heads learn from text that the model writes.
        uncertainty_lr: learning rate at which training learns a factor for each modality's weight (see
            :class:`mmtp.train.losses.uncertainty.Uncertainty`); 0 leaves the weights as they are.
        mtp_anchors: share of the positions from which drafts are trained in a step, drawn anew in every step. What heads cost in training
            falls with it: for ``synchronized`` and ``depth`` nearly all of it, for the others the part of the unembedding.
        z_weight: pulls the log-normaliser to 0 (PaLM, section 5).
        inputs: media that are predicted where they are input as well, such as the picture before a question: so every document teaches
            what pictures look like, not only those that end in one. The codes in question cost a forward pass in any case.
        flow_weight: weight of the flow-matching error of vectors that the model writes; its scale is another than that of nats.
        detach: draft heads read the backbone's states, embedding and unembedding without sending gradients into them.
        chunk_rows: rows whose logits are in memory at a time.
    """

    modality_weights: dict[str, float] = field(default_factory=dict)
    mtp_weight: float = 0.3
    mtp_decay: float = 0.8
    mtp_distill: float = 0.0
    mtp_anchors: float = 1.0
    uncertainty_lr: float = 0.0
    z_weight: float = 1e-5
    inputs: tuple[str, ...] = ()
    flow_weight: float = 1.0
    detach: bool = True
    chunk_rows: int = 1024

    def __post_init__(self) -> None:
        check_modalities((*self.modality_weights, *self.inputs))
        if not 0 <= self.mtp_distill <= 1:
            raise mmtp.config.ConfigError(f"loss: mtp_distill {self.mtp_distill:g} is a share; 0 to 1 is wanted")
        if not 0 < self.mtp_anchors <= 1:
            raise mmtp.config.ConfigError(f"loss: mtp_anchors {self.mtp_anchors:g} is a share; more than 0 and at most 1 is wanted")
        if self.uncertainty_lr < 0:
            raise mmtp.config.ConfigError(f"loss: uncertainty_lr {self.uncertainty_lr} is below 0")

    def draw_anchors(self, batch: Batch) -> Int[Tensor, "b n"] | None:
        """Positions of every row from which drafts are trained, in order; None for all."""
        if self.mtp_anchors == 1:
            return None
        rows, length = batch.tokens.shape
        number = max(1, round(self.mtp_anchors * length))
        return torch.rand(rows, length, device=batch.tokens.device).topk(number, dim=1).indices.sort(dim=1).values

    def offset_weight(self, offset: int) -> float:
        """Weight of an offset within its modality."""
        return self.mtp_weight * self.mtp_decay ** abs(offset) if offset else 1.0


def check_modalities(names: Iterable[str], where: str = "loss") -> None:
    """Refuses names in a table of a recipe that are no modality.

    Raises:
        ConfigError: names the first.
    """
    for name in names:
        if name not in set(Modality):
            raise mmtp.config.ConfigError(f"{where}: {name!r} is no modality; there are {', '.join(Modality)}")


@dataclass(frozen=True)
class LossOutput:
    """What one batch cost.

    Attributes:
        total: the scalar to differentiate.
        sums: summed cross-entropy in nats, by (modality, offset); offset 0 is the next token, ``BELOW`` the code one row below.
        counts: number of targets, likewise.
        correct: targets that were the most probable legal id, likewise.
        chance: what guessing evenly among the legal ids would cost, summed, in nats, likewise. ``sums / chance`` compares media whose
            vocabularies differ in size, and shows one that the others dominate.
        grads: norm of the gradient that each modality's part of the loss sends into the states before the unembedding, likewise;
            only where states learn. Of two that compete for one backbone, the greater has its way.
        divergence: of drafts, where ``mtp_distill`` is not 0: KL from the model's own distribution, summed, in nats, likewise.
        overlap: of drafts, likewise: 1 - TV between both distributions, summed; their mean is what speculation accepts at temperature 1.
        flow: mean flow-matching error of written vectors, by modality.
        states: those that predict the next token, after the final norm, for further losses on them.
    """

    total: Float[Tensor, ""]
    sums: dict[tuple[Modality, int], float]
    counts: dict[tuple[Modality, int], int]
    correct: dict[tuple[Modality, int], int]
    chance: dict[tuple[Modality, int], float]
    grads: dict[tuple[Modality, int], float]
    divergence: dict[tuple[Modality, int], float] = field(default_factory=dict)
    overlap: dict[tuple[Modality, int], float] = field(default_factory=dict)
    flow: dict[Modality, float] = field(default_factory=dict)
    states: Float[Tensor, "b s d"] | None = None


def unified_loss(
    states: list[Float[Tensor, "b _ d"]],
    unembedding: Float[Tensor, "v d"],
    batch: Batch,
    layout: VocabLayout,
    config: LossConfig,
    vertical: bool = False,
    anchors: Int[Tensor, "b n"] | None = None,
    group: dist.ProcessGroup | None = None,
    undrafted: int | None = None,
) -> LossOutput:
    """Loss of a batch.

    Where each process of a group has a part of the batch, all means are over the whole of it, and so are the numbers that come out, but
    for ``total``: that is the part's share times the number of processes, so that its mean over them (and what FSDP makes of gradients is
    the mean) is the loss of the whole.

    Args:
        states: those of offset 0 (next token) first, then one per draft offset; state k at t predicts x[t+1+k].
        unembedding: one row per vocabulary id.
        batch: the packed rows; targets are the tokens under ``loss_mask`` whose slot leaves a choice.
        layout: gives each slot's legal ids.
        config: weights.
        vertical: the last of ``states`` predicts the code below x[t].
        anchors: positions that the states of draft offsets stand for; None for all.
        group: processes that have the other parts of the batch; None where this is all of it.
        undrafted: slot whose tokens are no targets of draft offsets.
    """
    offsets = [*range(len(states) - 1), BELOW] if vertical else [*range(len(states))]
    plan = plan_targets(batch, layout, offsets, config.inputs, anchors, undrafted)
    keys = [(modality, offset) for modality in layout.modalities for offset in offsets]
    (counts,) = _tallies(plan, keys, group, lambda item: len(item.rows))
    parts = 1 if group is None else group.size()
    for item in plan:
        weight = parts * config.modality_weights.get(item.modality, 1.0) / counts[item.modality, item.offset]
        item.weight = weight * config.offset_weight(item.offset)
        item.z_weight = parts * config.z_weight / sum(n for (_, k), n in counts.items() if k == item.offset)
        item.learns_weight = item.offset == 0 or not config.detach
        item.distill = config.mtp_distill if item.offset else 0.0
    total: Any = _SlicedCrossEntropy.apply(unembedding, plan, config.chunk_rows, *states)
    sums, correct, chance, divergence, overlap, squares = _tallies(
        plan,
        keys,
        group,
        lambda item: item.total,
        lambda item: item.correct,
        lambda item: len(item.rows) * math.log(item.choices),
        lambda item: item.divergence,
        lambda item: item.overlap,
        lambda item: item.grad_square,
    )
    found = [key for key in keys if counts[key]]
    distilled = [key for key in found if key[1] and config.mtp_distill]
    return LossOutput(
        total,
        sums={key: sums[key] for key in found},
        counts={key: int(counts[key]) for key in found},
        correct={key: int(correct[key]) for key in found},
        chance={key: chance[key] for key in found},
        # The gradient is the mean of those of the processes, each of which has weighed its targets for all of them.
        grads={key: math.sqrt(squares[key]) / parts for key in found if squares[key]},
        divergence={key: divergence[key] for key in distilled},
        overlap={key: overlap[key] for key in distilled},
        states=states[0],
    )


TOLD = ("total", "correct", "divergence", "overlap", "grad_square")
"""Fields of :class:`Targets` that the loss fills in."""


@dataclass
class Targets:
    """Targets of one offset that stand in one slot: which rows predict them, which rows predict them as the next token, and which local
    id is right.
    """

    offset: int
    modality: Modality
    ranges: tuple[tuple[int, int], ...]
    rows: Int[Tensor, " n"]
    next_rows: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]
    weight: float = 0.0
    z_weight: float = 0.0
    learns_weight: bool = True
    distill: float = 0.0
    total: float = 0.0
    correct: float = 0.0
    divergence: float = 0.0
    overlap: float = 0.0
    grad_square: float = 0.0

    @property
    def choices(self) -> int:
        """Ids among which the right one is."""
        return sum(high - low for low, high in self.ranges)


def _tallies(
    plan: list[Targets], keys: list[tuple[Modality, int]], group: dist.ProcessGroup | None, *numbers: Callable[[Targets], float]
) -> list[dict[tuple[Modality, int], float]]:
    """Numbers of the items, each summed by (modality, offset), and over the processes of a group."""
    totals = torch.zeros(len(numbers), len(keys), dtype=torch.float64)
    for item in plan:
        totals[:, keys.index((item.modality, item.offset))] += torch.tensor([number(item) for number in numbers], dtype=torch.float64)
    if group is not None:
        dist.all_reduce(totals, group=group)
    return [dict(zip(keys, row, strict=True)) for row in totals.tolist()]


def plan_targets(
    batch: Batch,
    layout: VocabLayout,
    offsets: Sequence[int] = (0,),
    inputs: tuple[str, ...] = (),
    anchors: Int[Tensor, "b n"] | None = None,
    undrafted: int | None = None,
) -> list[Targets]:
    """Groups every target that leaves a choice by (offset, slot); of draft offsets only those that ``anchors`` predict, if given, and
    none in the slot ``undrafted``.
    """
    items = []
    s = batch.tokens.shape[1]
    here = torch.arange(s, device=batch.tokens.device)
    predicted = predicted_places(batch, layout, inputs)
    everywhere = here.expand_as(batch.tokens)
    for offset in offsets:
        back = above(batch, layout) if offset == BELOW else torch.full_like(batch.tokens, offset + 1)
        source = (here - back).clamp(min=0)
        same = batch.document_ids.gather(1, source) == batch.document_ids
        # Where the state stands that predicts each position; -1 where there is none.
        place, width = everywhere, s
        if offset and anchors is not None:
            width = anchors.shape[1]
            place = torch.full_like(batch.tokens, -1).scatter(1, anchors, here[:width].expand_as(anchors))
        place = place.gather(1, source)
        rows, columns = (predicted & same & (back > 0) & (here >= back) & (place >= 0)).nonzero(as_tuple=True)
        slots = batch.slots[rows, columns]
        targets = batch.tokens[rows, columns]
        flat, before = rows * width + place[rows, columns], rows * s + columns - 1
        for index in slots.unique().tolist():
            slot = layout.slots[index]
            if slot.size == 1 or (offset and index == undrafted):
                continue  # a forced id has probability 1, nothing to learn
            local = local_ids(targets, slot.generable)
            chosen = ((slots == index) & (local >= 0)).nonzero(as_tuple=True)[0]  # what is input only is no target
            if not len(chosen):
                continue
            items.append(Targets(offset, slot.modality, slot.generable, flat[chosen], before[chosen], local[chosen]))
    return items


def predicted_places(batch: Batch, layout: VocabLayout, inputs: Sequence[str] = ()) -> Bool[Tensor, "b s"]:
    """Places whose tokens are targets: those under ``loss_mask``, and all of the media that are predicted as inputs as well."""
    if not inputs:
        return batch.loss_mask
    return batch.loss_mask | torch.tensor([slot.modality in inputs for slot in layout.slots], device=batch.slots.device)[batch.slots]


def local_ids(ids: Int[Tensor, " n"], ranges: tuple[tuple[int, int], ...]) -> Int[Tensor, " n"]:
    """Place of each id among the ids of the ranges; -1 outside."""
    local, base = torch.full_like(ids, -1), 0
    for low, high in ranges:
        inside = (ids >= low) & (ids < high)
        local = torch.where(inside, ids - low + base, local)
        base += high - low
    return local


class _SlicedCrossEntropy(torch.autograd.Function):
    """Weighted sum of all items' cross-entropies; gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, unembedding: Tensor, plan: list[Targets], chunk_rows: int, *states: Tensor) -> Tensor:
        device = unembedding.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else unembedding.dtype
        flat = [state.reshape(-1, state.shape[-1]) for state in states]
        grads = [torch.zeros_like(f) for f in flat]
        grad_weight = torch.zeros_like(unembedding, dtype=torch.float32)
        total = torch.zeros((), device=unembedding.device)
        weights: dict[Any, Tensor] = {}
        # Fields of every item. They stay where they are computed until the end, for whoever asks waits for the device.
        told = torch.zeros(len(plan), len(TOLD), dtype=torch.float64, device=unembedding.device)
        with torch.autocast(device, enabled=False):
            for item, numbers in zip(plan, told, strict=True):
                # A frozen backbone's own loss is measured, its gradients are not needed.
                learns_state = ctx.needs_input_grad[3:][item.offset]  # BELOW is the last
                learns_weight = item.learns_weight and ctx.needs_input_grad[0]
                if item.ranges not in weights:  # the same at all offsets
                    weights[item.ranges] = torch.cat([unembedding[low:high] for low, high in item.ranges]).to(dtype)
                weight = weights[item.ranges]
                for start in range(0, len(item.rows), chunk_rows):
                    rows = item.rows[start : start + chunk_rows]
                    target = item.targets[start : start + chunk_rows].unsqueeze(1)
                    x = flat[item.offset][rows].to(dtype)
                    logits = (x @ weight.T).float()
                    top, picked = logits.amax(1, keepdim=True), logits.gather(1, target)
                    correct = (picked >= top).sum()
                    logits.sub_(top)
                    shares = logits.exp() if item.distill else logits.exp_()  # in proportion to probabilities
                    sums = shares.sum(1, keepdim=True)
                    normaliser = top + sums.log()
                    entropy = loss = (normaliser - picked).sum()
                    wanted = divergence = overlap = grad_square = None
                    if item.distill:
                        wanted = (flat[0][item.next_rows[start : start + chunk_rows]].to(dtype) @ weight.T).float().log_softmax(1)
                        logits.sub_(sums.log())
                        divergence = F.kl_div(logits, wanted, reduction="sum", log_target=True)
                        overlap = torch.minimum(logits, wanted).exp_().sum()
                        loss = (1 - item.distill) * loss + item.distill * divergence
                    total += item.weight * loss + item.z_weight * normaliser.square().sum()
                    if learns_state or learns_weight:
                        # d/dlogits of  w [(1 - a) (lse - x_target) + a KL] + z lse^2
                        #            =  (w + 2 z lse) softmax - w [(1 - a) onehot + a wanted]
                        grad = shares.mul_((item.weight + 2 * item.z_weight * normaliser) / sums)
                        grad.scatter_add_(1, target, torch.full_like(picked, -item.weight * (1 - item.distill)))
                        if wanted is not None:
                            grad.sub_(wanted.exp_(), alpha=item.weight * item.distill)
                        grad = grad.to(dtype)
                        into_state = grad @ weight
                        # A row has one target per offset, so squares of modalities add up to those of the whole gradient.
                        grad_square = into_state.float().square().sum() if learns_state else None
                        grads[item.offset].index_add_(0, rows, into_state.to(grads[item.offset].dtype))
                        if learns_weight:
                            step, base = grad.T @ x, 0
                            for low, high in item.ranges:
                                grad_weight[low:high] += step[base : base + high - low]
                                base += high - low
                    for place, number in enumerate((entropy, correct, divergence, overlap, grad_square)):
                        if number is not None:
                            numbers[place] += number
        for item, numbers in zip(plan, told.tolist(), strict=True):
            for name, number in zip(TOLD, numbers, strict=True):
                setattr(item, name, number)
        ctx.grads = [g.view_as(s) for g, s in zip(grads, states, strict=True)]
        ctx.grad_weight = grad_weight.to(unembedding.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (scale,) = grad_outputs
        return ctx.grad_weight * scale, None, None, *(g * scale for g in ctx.grads)
