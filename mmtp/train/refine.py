"""A refiner (:mod:`mmtp.models.refiner`) learns from rounds of decoding: what was left behind refused drafts, and what proved true there.

The model decodes prompts speculatively, with the refiner as it is so far. Each round is kept: the newest true state, the states that the
pass left for the places to come with what they had read, the tokens that then stood there, and the true states that later passes gave
these places. The refiner goes through a round place by place, as it does when it drafts, and learns the model's own distribution at each
(soft cross-entropy). A draft counts only where all drafts before it stood, so that a place reads the tokens that stood, and states that
are the refiner's own. As what is left depends on what is drafted, rounds are made anew with the refiner that has learnt, a few times over
(DAgger, Ross et al. 2011, arXiv 1011.0686, algorithm 3.1).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmtp.decode.chooser import Chooser
from mmtp.decode.drafts import Drafter
from mmtp.decode.engine import Engine
from mmtp.decode.refined import RefinedDrafter
from mmtp.decode.rows import Lane, Request, Row
from mmtp.models.refiner import Refiner
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import VocabLayout
from mmtp.types import MmtpError, Modality

DEPTH = 6
"""Places of a round that are learnt: as many drafts as mostly pay."""

LANES = 8
"""Prompts that are decoded together."""

NONE = -1
"""Index of no state."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Rounds of decoding.

    Attributes:
        states: of all of them, float16.
        before: index of the newest true state.
        left: of what the pass left for each place; NONE where it left nothing.
        target: of what later passes gave; NONE where the place was not reached, or the grammar leaves no choice about it.
        tokens: that stood: the two before the first place, and then all but the last.
        read: before each place, by what was left for it.
        slots: of the places.
    """

    states: Float[Tensor, "p w"]
    before: Int[Tensor, " n"]
    left: Int[Tensor, "n k"]
    target: Int[Tensor, "n k"]
    tokens: Int[Tensor, "n k1"]
    read: Int[Tensor, "n k"]
    slots: Int[Tensor, "n k"]

    def __len__(self) -> int:
        return len(self.before)

    def by_medium(self, layout: VocabLayout) -> dict[str, Int[Tensor, " _"]]:
        """Indices of the rounds that begin with each medium."""
        media = torch.tensor([slot.modality.index for slot in layout.slots])[self.slots[:, 0]]
        return {str(medium): found for medium in Modality if len(found := (media == medium.index).nonzero().flatten())}

    def __add__(self, other: "Rounds") -> "Rounds":
        moved = {field.name: getattr(other, field.name) for field in fields(other)}
        for name in ("before", "left", "target"):
            moved[name] = torch.where(moved[name] == NONE, NONE, moved[name] + len(self.states))
        return Rounds(**{name: torch.cat([getattr(self, name), values]) for name, values in moved.items()})


class _Notes:
    """What is seen of the streams that are decoded, of rows and of the branches that guide them."""

    def __init__(self, layout: VocabLayout) -> None:
        self._drafted = [slot.forced is None for slot in layout.slots]
        self._states: list[Tensor] = []
        self._true: defaultdict[tuple[int, bool], dict[int, int]] = defaultdict(dict)
        self._rounds: list[tuple[Row, bool, int, dict[int, tuple[int, int]]]] = []

    def take(self, row: Row, hidden: Float[Tensor, "b s d"]) -> None:
        """Notes what the last pass gave a row."""
        length = len(row.tokens)
        for guides in (False, True):
            true = self._true[id(row), guides]
            left: dict[int, tuple[int, int]] = {}
            for i, (choice, _) in enumerate(row.judged):
                at = choice.guide if guides else (row.index, choice.column)
                read = row.judged[i - 1][0].draft if i else None
                if at is None or (choice.place >= length and read is None):
                    continue
                if choice.place < length:
                    true[choice.place] = len(self._states)
                elif read is not None:
                    left[choice.place] = len(self._states), read.token
                self._states.append(hidden[at].half())
            if not row.done and length - 1 in true:
                self._rounds.append((row, guides, length, left))

    def rounds(self) -> Rounds:
        """All that was seen.

        Raises:
            MmtpError: nothing was.
        """
        found: dict[str, list[list[int]]] = {name: [] for name in ("left", "target", "tokens", "read", "slots")}
        befores = []
        for row, guides, first, left in self._rounds:
            true, places = self._true[id(row), guides], range(first, first + DEPTH)
            targets = [true.get(place, NONE) if place < len(row.tokens) and self._drafted[row.slots[place]] else NONE for place in places]
            # Behind a place that is not drafted, or was not read, drafts begin anew.
            reached = next((k for k, target in enumerate(targets) if target == NONE), DEPTH)
            if not reached:
                continue
            befores.append(true[first - 1])
            lefts = [left.get(place, (NONE, 0)) for place in places]
            found["left"].append([index for index, _ in lefts])
            found["read"].append([token for _, token in lefts])
            found["target"].append(targets[:reached] + [NONE] * (DEPTH - reached))
            found["tokens"].append(_padded(row.tokens[first - 2 : first + DEPTH - 1], DEPTH + 1))
            found["slots"].append(_padded(row.slots[first : first + DEPTH], DEPTH))
        if not befores:
            raise MmtpError("nothing was written that a refiner could learn from; give prompts that a model answers with more than a token")
        return Rounds(
            states=torch.stack(self._states), before=torch.tensor(befores), **{name: torch.tensor(value) for name, value in found.items()}
        )


def _padded(values: Sequence[int], length: int) -> list[int]:
    return [*values, *[0] * (length - len(values))]


@dataclass(frozen=True)
class _Watched:
    """Drafts by a refiner, while notes are taken."""

    refiner: Refiner
    notes: _Notes

    def length(self, model: object) -> int:
        return DEPTH

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> Drafter:
        return _Watcher(chooser, DEPTH, self.refiner, self.notes)


class _Watcher(RefinedDrafter):
    def __init__(self, chooser: Chooser, max_drafts: int, refiner: Refiner, notes: _Notes) -> None:
        super().__init__(chooser, max_drafts, refiner, list(Modality))
        self.notes = notes

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        for row in rows:
            self.notes.take(row, hidden)
        super().propose(rows, lanes, hidden, counts, least)


def collect(
    model: UnifiedModel,
    refiner: Refiner,
    requests: Sequence[Request],
    compile: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Rounds, float]:
    """Decodes with a refiner, all drafts made.

    Args:
        model: in evaluation mode.
        refiner: as it is so far.
        requests: what is to be gone on with.
        compile: whether passes are compiled.
        progress: called with the rows that are done, and all.

    Returns:
        The rounds, and how many tokens a pass gave.

    Raises:
        MmtpError: nothing was written, but for first tokens.
    """
    notes = _Notes(model.config.layout)
    engine = Engine(model, compile=compile, draft_cost=0, drafts=_Watched(refiner, notes))
    batcher = engine.batcher(max_lanes=LANES, context=max(len(r.prefix) + r.max_new_tokens for r in requests), shared=None)
    rows = [batcher.submit(request) for request in requests]
    while not all(row.done for row in rows):
        batcher.step()
        if progress is not None:
            progress(sum(row.done for row in rows), len(rows))
    passes = [tokens for row in rows for tokens in row.stats.per_pass]
    return notes.rounds(), sum(passes) / max(1, len(passes))


class RefinerLoss:
    """What a refiner is to make small.

    Args:
        model: whose states are refined.
    """

    def __init__(self, model: UnifiedModel) -> None:
        self.model = model
        table = model.unembedding.weight.detach()
        self._weights = [torch.cat([table[lo:hi] for lo, hi in slot.generable] or [table[:0]]) for slot in model.config.layout.slots]

    def __call__(self, refiner: Refiner, rounds: Rounds, chosen: Int[Tensor, " b"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean over the places of some rounds that are refined: soft cross-entropy in nats, and how far distributions overlap (1 - total
        variation). NaN where there is no such place.
        """
        target = rounds.target[chosen]
        # A place whose state has read the right token is drafted by it as it is.
        right = (rounds.left[chosen] != NONE) & (rounds.read[chosen] == rounds.tokens[chosen][:, 1:])
        refined, known = self.unroll(refiner, rounds, chosen), (target != NONE) & ~right
        slots, norm = rounds.slots[chosen][known], self.model.backbone.norm
        states, truths = refined[known], rounds.states[target[known]].to(refined.dtype)
        losses, overlaps = [], []
        for slot in slots.unique().tolist():
            weight, own = self._weights[slot], slots == slot
            with torch.no_grad():
                p = (norm(truths[own]) @ weight.T).float().softmax(1)
            log_q = (norm(states[own]) @ weight.T).float().log_softmax(1)
            losses.append(-(p * log_q).sum(1))
            overlaps.append(torch.minimum(p, log_q.detach().exp()).sum(1))
        nothing = [states.new_full((1,), math.nan)]
        return torch.cat(losses or nothing).mean(), torch.cat(overlaps or nothing).mean()

    def unroll(self, refiner: Refiner, rounds: Rounds, chosen: Int[Tensor, " b"]) -> Float[Tensor, "b k w"]:
        """States of the places, each from that before it, as drafts are made."""
        states, tokens = rounds.states, rounds.tokens[chosen]
        embedded, read = (self.model.embed(each).detach() for each in (tokens, rounds.read[chosen]))
        before, refined = states[rounds.before[chosen]].to(embedded.dtype), []
        for k in range(rounds.left.shape[1]):
            index = rounds.left[chosen, k]
            carried: Bool[Tensor, " b"] = index != NONE
            state = torch.where(carried.unsqueeze(1), states[index.clamp(min=0)].to(before.dtype), before)
            told = torch.where(carried.unsqueeze(1), read[:, k], embedded[:, k])
            right = carried & (rounds.read[chosen, k] == tokens[:, k + 1])
            changed = refiner(state, told, before, embedded[:, k + 1], carried)
            before = torch.where(right.unsqueeze(1), state, changed)
            refined.append(before)
        return torch.stack(refined, 1)


@torch.no_grad()
def overlaps(model: UnifiedModel, refiner: Refiner, rounds: Rounds, most: int = 4096) -> dict[str, float]:
    """How far what is refined overlaps with the model's distribution (1 - total variation), by the medium that rounds begin with.

    Measured on rounds that it has learnt from this says little: it soon knows them by heart.

    Args:
        model: whose states are refined, in evaluation mode.
        refiner: float32.
        rounds: to measure on.
        most: rounds of a medium that are taken.
    """
    loss, found = RefinerLoss(model), {}
    for medium, members in rounds.by_medium(model.config.layout).items():
        parts = [loss(refiner, rounds, chosen)[1] for chosen in members[:most].split(512)]
        found[medium] = float(torch.stack(parts).nanmean())
    return found


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a refiner is fitted.

    Attributes:
        batch: rounds per step.
        lr: at its highest; it rises over the first twentieth of the steps and falls to nothing by a half cosine.
        weight_decay: of AdamW.
        precision: of products in training.
    """

    batch: int = 96
    lr: float = 2e-3
    weight_decay: float = 0.02
    precision: torch.dtype = torch.bfloat16


def fit(
    model: UnifiedModel, refiner: Refiner, rounds: Rounds, steps: int, config: FitConfig | None = None, seed: int = 0
) -> Iterator[tuple[float, float]]:
    """Fits a refiner, in place.

    Args:
        model: whose states are refined, in evaluation mode.
        refiner: float32.
        rounds: to learn from.
        steps: of AdamW.
        config: how.
        seed: of the rounds that are drawn.

    Yields:
        Loss in nats and overlap of each step.
    """
    config, generator, loss = config or FitConfig(), torch.Generator().manual_seed(seed), RefinerLoss(model)
    slots = rounds.slots[rounds.target != NONE].unique().tolist()
    refiner.media |= {str(model.config.layout.slots[slot].modality) for slot in slots}
    for weight in refiner.parameters:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(refiner.parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    rise, groups = max(1, steps // 20), list(rounds.by_medium(model.config.layout).values())
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise)))
    )
    for _ in range(steps):
        # As many of each medium: answers in words are short beside pictures and sounds, and have as much to be learnt.
        drawn = [members[torch.randint(len(members), (config.batch // len(groups) or 1,), generator=generator)] for members in groups]
        chosen = torch.cat(drawn)
        with torch.autocast("cpu", config.precision, enabled=config.precision != torch.float32):
            value, overlap = loss(refiner, rounds, chosen)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(refiner.parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield value.item(), overlap.item()
    for weight in refiner.parameters:
        weight.requires_grad_(False)
