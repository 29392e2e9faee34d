"""Requests on their way through the engine: what stands, what is drafted, and the unconditional branch of guided ones."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmtp.decode.constrain import AnswerState, Constraint, ConstraintError
from mmtp.decode.pace import Pace
from mmtp.decode.sample import Draft, Noise, Sampling
from mmtp.decode.stats import DecodeStats, Generation
from mmtp.models.heads.base import FORCED
from mmtp.models.next_scale import NextScale
from mmtp.stream.grammar import GrammarState, StreamGrammar
from mmtp.stream.vocab import Special
from mmtp.types import MmtpError


class DecodeError(MmtpError):
    """A request that cannot be decoded, or was not to its end: names the row and what to change."""


class FeaturesError(MmtpError):
    """A prompt whose vectors do not fit its places for them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What is to go on from where, and how.

    Attributes:
        prefix: the start of a legal stream, at least one token.
        sampling: how tokens are chosen; the default samples at temperature 1 with seed 0.
        max_new_tokens: limit.
        stop: ids after which to end.
        vectors: what the ``<feature>`` tokens of the prefix stand for, in order, in the model's width.
        constraint: what the new tokens must meet. They are text then, up to the token that ends the turn (or the document, outside of
            turns), and the row ends with it. The limit may cut them before; ``cut`` of the result tells.
    """

    prefix: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 512
    stop: Collection[int] = ()
    vectors: Float[Tensor, "n d"] | None = None
    constraint: Constraint | None = None


class Lane:
    """A stream that a lane of the batch carries: its tokens for good, and drafts that may follow them.

    Args:
        state: the grammar's, before the first token.

    Attributes:
        index: lane of the pass; -1 before it has one.
        reading: whether more of its row's prompt is to be read, after the pass that is on.
        slots: of the grammar, in which every token stands.
        vectors: offset -> what stands there in place of the token's embedding; runs of vectors, in order.
        inputs: offsets at which each continuous span begins and ends whose positions see each other.
        draft_states: [j] is the state after j drafts.
    """

    def __init__(self, state: GrammarState) -> None:
        self.index, self.reading = -1, False
        self.begin(state)

    def begin(self, state: GrammarState) -> None:
        """Starts anew."""
        self.state = state
        self.tokens: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        self.slots: list[int] = []
        self.vectors: dict[int, Float[Tensor, "_ d"]] = {}
        self.inputs: list[tuple[int, int]] = []
        self.forget_drafts()

    @property
    def rests(self) -> bool:
        """Whether it has nothing to read."""
        return False

    def append(self, token: int) -> None:
        """Keeps a token for good."""
        self.slots.append(self.state.slot)
        self.positions.append(self.state.push(token))
        self.tokens.append(token)

    def draft(self, token: int) -> None:
        """Adds a draft."""
        after = self.draft_states[-1].copy()
        self.draft_positions.append(after.push(token))
        self.drafts.append(token)
        self.draft_states.append(after)

    def chunk_end(self, start: int, most: int) -> int:
        """How far a pass reads that is not to read more than it must: to the end, or so far that a span whose positions see each other is
        read at once.

        Args:
            start: where it begins.
            most: tokens; a span may have more.
        """
        end = min(start + most, len(self.tokens))
        for first, stop in self.inputs:
            if first < end < stop:
                end = first if first > start else stop
        return end

    def window_slots(self, first: int, length: int) -> list[int]:
        """Slots of so many tokens from an offset on, drafts among them."""
        slots = self.slots[first:] + [state.slot for state in self.draft_states[max(0, first - len(self.slots)) : -1]]
        return slots[:length]

    def forget_drafts(self) -> None:
        self.drafts: list[int] = []
        self.draft_positions: list[tuple[int, int, int]] = []
        self.draft_states: list[GrammarState] = [self.state]


class Branch(Lane):
    """The unconditional side of a guided row: ``<bos>`` and the span in progress, as a document of the `plain` task holds it.

    It takes the tokens that its row takes, from an opener on. Between spans it rests.

    Attributes:
        fresh: a span was opened; what the caches hold of the last one is void.
    """

    def __init__(self, grammar: StreamGrammar) -> None:
        super().__init__(grammar.begin())
        self.grammar = grammar
        self.fresh = False

    @property
    def open(self) -> bool:
        return self.state.in_span

    @property
    def rests(self) -> bool:
        return not self.state.in_span

    @property
    def openers(self) -> Collection[int]:
        """Ids that open a span, and so start the branch anew."""
        return self.grammar.rules.keys()

    def follow(self, token: int) -> None:
        """Takes a token of the row for good."""
        if token in self.openers:
            self.begin(self.grammar.begin())
            self.append(Special.BOS)
            self.fresh = True
        elif not self.open:
            return
        self.append(token)

    def follow_draft(self, token: int) -> None:
        """Takes a draft of the row."""
        if self.draft_states[-1].in_span:
            self.draft(token)

    def guide(self, ahead: int, column: int) -> tuple[int, int] | None:
        """Lane and column that guide the choice after so many drafts; None outside of the span."""
        inside = ahead < len(self.draft_states) and self.draft_states[ahead].in_span
        return (self.index, column) if inside else None


class Row(Lane):
    """One request.

    Args:
        grammar: of the model's vocabulary.
        request: what is asked.
        number: by which messages call it.
        context: tokens that the row may have, its prefix among them; None for as many as it asks for.
        pace: tells how many drafts pay; without it all are made.
        next_scale: of a model that writes pictures scale by scale.
        clock: tells the time, in seconds.

    Attributes:
        prompt_length: where the new tokens begin.
        settled: tokens that were known when they were read, by this row or by another that they were copied from: what drafters keep of
            them comes of no draft that did not stand.
        done: whether it has ended.
        cut: whether the limit ended the row, or the context.
        cancelled: whether it was told to end.
        proposals: the drafts, as they were drawn.
        offsets: at which each draft was made; ``BELOW`` from the row above it.
        judged: the places of the last pass, each with what was chosen; also those behind a draft that was refused.

    Raises:
        GrammarError: the prefix breaks the grammar; names the offset.
        DecodeError: the prefix is empty or leaves no room in the context, or the limit is negative.
        FeaturesError: the prefix has other places for vectors.
        ConstraintError: no text may follow the prefix, or the constraint was compiled for another vocabulary.
    """

    def __init__(
        self,
        grammar: StreamGrammar,
        request: Request,
        number: int = 0,
        context: int | None = None,
        pace: Pace | None = None,
        next_scale: NextScale | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.number, self.pace, self.next_scale, self.clock = number, pace, next_scale, clock
        self.prompt_length = self.settled = len(request.prefix)
        limit = request.max_new_tokens
        if not self.prompt_length:
            raise DecodeError(f"row {number}: the prefix is empty; a stream starts with <bos>")
        if limit < 0:
            raise DecodeError(f"row {number}: max_new_tokens {limit}: 0 or more is wanted")
        if context is not None and self.prompt_length + min(limit, 1) > context:
            raise DecodeError(f"row {number}: a prefix of {self.prompt_length} tokens leaves no room in a context of {context}; shorten it")
        super().__init__(grammar.begin())
        self.begun = clock()
        self.sampling, self.stop = request.sampling, request.stop
        self.noise = Noise(request.sampling.seed)
        self.stats = DecodeStats()
        self.written: list[Float[Tensor, " c"]] = []
        self.branch = Branch(grammar) if request.sampling.guided else None
        first, last = grammar.layout.text_range
        self._first_text = first
        # Which text tokens stand in the stream; nothing but the penalty asks.
        self._written_text = torch.zeros(last - first if self.sampling.repetition_penalty != 1 else 0, dtype=torch.bool)
        for token in request.prefix:
            self.append(token)
            self._note(token)
            if self.branch is not None:
                self.branch.follow(token)
        self._take_inputs(grammar, request.vectors)
        if request.constraint is not None:
            self._constrain(grammar, request.constraint)
        self.end = self.prompt_length + limit if context is None else min(self.prompt_length + limit, context)
        self.done = limit == 0 or self.state.done
        self.cut = not self.state.done
        self.cancelled = False
        self.judged: list[tuple[Choice, Draft]] = []
        self.forget_drafts()

    def forget_drafts(self) -> None:
        super().forget_drafts()
        self.proposals: list[Draft] = []
        self.offsets: list[int] = []
        if self.pace is not None:
            self.pace.begin()

    def _take_inputs(self, grammar: StreamGrammar, vectors: Float[Tensor, "n d"] | None) -> None:
        """Puts vectors at the places of the prefix that are for them."""
        if vectors is None and Special.FEATURE not in self.tokens:
            return
        bodies = [span.body for span in grammar.spans(np.array(self.tokens)) if span.continuous]
        places, given = self.tokens.count(Special.FEATURE), 0 if vectors is None else len(vectors)
        if places != given or places != sum(body.stop - body.start for body in bodies):
            raise FeaturesError(f"row {self.number}: {given} vectors for {places} <feature> tokens; each needs one, and its span an end")
        if vectors is not None:
            self.inputs = [(body.start, body.stop) for body in bodies]
            runs = vectors.split([body.stop - body.start for body in bodies])
            self.vectors = {body.start: run for body, run in zip(bodies, runs, strict=True)}

    def _constrain(self, grammar: StreamGrammar, constraint: Constraint) -> None:
        """From here on, tokens are those of an answer that meets a constraint."""
        if constraint.layout != grammar.layout:
            raise ConstraintError(f"row {self.number}: {constraint.name} was compiled for another vocabulary")
        if self.state.slot not in (grammar.turn, grammar.doc):
            raise ConstraintError(f"row {self.number}: {constraint.name} needs a prefix after which text may stand")
        self.state = AnswerState(self.state, constraint.follow())

    def answer(self, ahead: int) -> AnswerState | None:
        """Where the constrained answer stands after so many drafts; None where nothing constrains what comes next."""
        state = self.draft_states[ahead]
        return state if isinstance(state, AnswerState) and not state.done else None

    @property
    def failure(self) -> str:
        """Why a constrained answer could not go on; empty where it could."""
        return self.state.failure if isinstance(self.state, AnswerState) else ""

    @property
    def generation(self) -> Generation:
        """What has come of it so far.

        Raises:
            DecodeError: it was cancelled.
        """
        if self.cancelled:
            raise DecodeError(f"row {self.number}: was cancelled after {len(self.tokens) - self.prompt_length} new tokens")
        vectors = torch.stack(self.written) if self.written else None
        return Generation(self.tokens, self.prompt_length, self.stats, vectors, self.cut, self.failure)

    def finish(self) -> None:
        """Is at its end: drops what nobody will ask for again."""
        self.forget_drafts()
        self.judged = []
        self.stats.seconds = self.clock() - self.begun

    def push(self, token: int) -> None:
        """Keeps a token for good, which may end the row."""
        self.append(token)
        self._note(token)
        if self.branch is not None:
            self.branch.follow(token)
        ended = token in self.stop or self.state.done
        self.done = ended or len(self.tokens) >= self.end
        self.cut = not ended

    def _note(self, token: int) -> None:
        if 0 <= token - self._first_text < len(self._written_text):
            self._written_text[token - self._first_text] = True

    def accept(self, truths: Sequence[int]) -> int:
        """Keeps true choices up to the first that differs from its draft; returns how many drafts stood."""
        drafted = [(str(state.modality), offset) for state, offset in zip(self.draft_states, self.offsets, strict=False)]
        before, kept = len(self.tokens), 0
        for j, truth in enumerate(truths):
            self.push(truth)
            if j == len(self.drafts) or truth != self.drafts[j]:
                break
            kept += 1
            if self.done:
                break
        self._count(len(self.tokens) - before)
        self.stats.drafted.update(drafted)
        self.stats.accepted.update(drafted[:kept])
        if self.pace is not None:
            self.pace.learn([medium for medium, _ in drafted], kept)
        self.noise.forget_before(len(self.tokens))
        return kept

    def _count(self, tokens: int) -> None:
        """Tokens of a pass."""
        if not self.stats.per_pass:
            self.stats.first = self.clock() - self.begun
        self.stats.per_pass.append(tokens)

    def take_scale(self, codes: Sequence[int]) -> None:
        """Keeps the codes of a scale, as far as the row goes on."""
        before = len(self.tokens)
        for code in codes:
            if not self.done:
                self.push(code)
        self._count(len(self.tokens) - before)
        self.noise.forget_before(len(self.tokens))

    def take_vector(self, vector: Float[Tensor, " c"], embedded: Float[Tensor, "1 d"]) -> None:
        """Keeps what the newest token, a ``<feature>``, stands for."""
        self.written.append(vector)
        for lane in self.lanes:
            lane.vectors[len(lane.tokens) - 1] = embedded

    @property
    def rejects(self) -> bool:
        """Whether its drafts are judged by rejection, so that the output hangs on the very probabilities of drafts."""
        return self.sampling.verification == "rejection"

    def alike(self, other: Lane, length: int) -> int:
        """How much of ``length`` tokens in common with another lane has equal vectors too, and cuts no span that is read at once."""
        for first in self.vectors.keys() | other.vectors.keys():
            one, two = self.vectors.get(first), other.vectors.get(first)
            if first < length and (one is None or two is None or one.shape != two.shape or not torch.equal(one, two)):
                length = first
        for first, end in (*self.inputs, *other.inputs):
            if first < length and (end > length or (first, end) not in self.inputs or (first, end) not in other.inputs):
                length = first
        return length

    @property
    def lanes(self) -> list[Lane]:
        """The row, and its branch where it is guided."""
        return [self] if self.branch is None else [self, self.branch]

    def weight(self, state: GrammarState, ahead: int = 0) -> float:
        """Scale of guidance at the place that follows a state, or at the code so many further on."""
        return self.sampling.of(state.span_modality).weight(state.progress(ahead))

    def seen(self, places: Sequence[int]) -> Bool[Tensor, "m n"]:
        """Which text tokens stand before some places, drafts among them."""
        seen = self._written_text.repeat(len(places), 1)
        for row, place in zip(seen, places, strict=True):
            for token in self.drafts[: place - len(self.tokens)]:
                if 0 <= token - self._first_text < len(row):
                    row[token - self._first_text] = True
        return seen

    @property
    def withheld(self) -> Collection[int]:
        """Ids that are not drafted: a guided row drafts no opener, for the branch starts there, and its first choice could not be verified
        in the same pass.
        """
        return () if self.branch is None else self.branch.openers

    def take_draft(self, draft: Draft, offset: int, making: float = 0.0) -> bool:
        """Adds a draft of an offset; whether a further one makes sense.

        Vectors are not drafted, nor what is withheld or breaks a constraint.

        Args:
            draft: what was drawn.
            offset: to count it by.
            making: passes of the model that it took.
        """
        token, answer = draft.token, self.answer(-1)
        if token == Special.FEATURE or token in self.withheld or (answer is not None and not answer.allows(token)):
            return False
        if self.branch is not None:
            self.branch.follow_draft(token)
        if self.pace is not None:
            self.pace.take(str(self.draft_states[-1].modality), making)
        self.draft(token)
        self.proposals.append(draft)
        self.offsets.append(offset)
        return True

    def draft_forced(self, most: int) -> None:
        """Adds the tokens about which the constraint leaves no choice; they cost no pass of a head.

        Args:
            most: drafts in all.
        """
        while self.room and len(self.drafts) < most and (answer := self.answer(-1)) is not None and answer.forced is not None:
            self.take_draft(Draft(answer.forced), FORCED)

    @property
    def room(self) -> bool:
        """Whether a further draft could stand: the stream goes on, one by one, and the limit leaves room for the token that verification
        adds.
        """
        goes_on = not self.draft_states[-1].done and not self.scale_due
        return goes_on and len(self.tokens) + len(self.drafts) + 1 < self.end

    @property
    def scale_due(self) -> bool:
        """Whether a whole scale comes after the drafts."""
        return self.next_scale is not None and self.next_scale.due(self.draft_states[-1]) is not None

    def share_pass(self, lanes: int) -> None:
        """Is one of so many lanes in the next pass, which makes drafts dearer. How many are made shows in what rejection puts out, and must
        not hang on others there: then its own lanes count.
        """
        if self.pace is not None:
            self.pace.among(sum(not lane.rests for lane in self.lanes) if self.rejects else lanes)

    def alone(self, passes: float) -> float:
        """What is done for this row alone and takes so many passes over one token, in its part of the pass that it shares."""
        return passes if self.pace is None else self.pace.alone(passes)

    def wants(self, making: float = 0.0) -> bool:
        """Whether a further draft is to be made, which takes so many passes of the model: it could stand, and it has to pay."""
        return self.room and (self.pace is None or self.pace.pays(str(self.draft_states[-1].modality), making))

    def wanted(self, most: int, making: float = 0.0) -> int:
        """How many drafts of one medium are to be planned, that take so many passes each; whether one is to be made :meth:`wants` tells."""
        if not self.room or self.pace is None:
            return most if self.room else 0
        return self.pace.count(str(self.draft_states[-1].modality), most, making)


class Choice(NamedTuple):
    """A place where a token is to be chosen.

    Attributes:
        row: whose.
        column: index into the pass of the state that predicts it.
        slot: what the grammar allows there.
        place: in the stream.
        guide: lane of the branch and index into the pass of its state; None where nothing guides.
        weight: scale of guidance.
        draft: what was proposed there, where a choice is to judge it.
        answer: what a constraint allows there; None where nothing constrains.
    """

    row: Row
    column: int
    slot: int
    place: int
    guide: tuple[int, int] | None = None
    weight: float = 1.0
    draft: Draft | None = None
    answer: AnswerState | None = None
