"""Continuous batching: requests join a running batch when there is room, and leave it when they are done (Yu et al. 2022, Orca).

Rows take the first lanes of the cache, a guided row two. What joins reads its prompt in chunks, each in a pass of all that read and of the
rows that run: so nobody waits for a long prompt (Agrawal et al. 2024, Sarathi-Serve, arXiv 2403.02310, section 4.2). Where a pass would
pad all lanes to the chunk, those that read have one for themselves, and the rows that run take turns with it. What leaves gives its lane
to the last row, so that a pass is always of just the lanes in use. What a lane held stays behind it until the lane is needed, and with it
the keys and values of prompts that others may begin with: a row that joins copies what it has in common with one that is there, or was
lately, and reads the rest. Whatever comes and goes, a row's output is that of its solo run.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.decode.cache import KVCache
from mmtp.decode.chooser import MIN_EXACT_WIDTH, Chooser, exact_width
from mmtp.decode.drafts import Drafter, Drafts
from mmtp.decode.pace import Experience, Experiences, Pace
from mmtp.decode.rows import Choice, DecodeError, Lane, Request, Row
from mmtp.decode.sample import Sampling
from mmtp.decode.scales import Due
from mmtp.decode.stats import Generation
from mmtp.decode.vectors import write_blocks, write_tokens
from mmtp.stream.vocab import Special

FORCED_DRAFTS = 16  # tokens without a choice that may follow the drafts of a pass
SHARED = 32
"""Tokens in common from which on copying them is worth a pass more for the rest."""
CHUNK = 512
"""Tokens of prompts that a pass reads at most: as many as keep a processor busy, and hold up the others little."""


class Piece(NamedTuple):
    """What came of a row since the last piece.

    Attributes:
        tokens: new ones; none is taken back.
        generation: the whole, with the last piece; None before.
        vectors: what the ``<feature>`` tokens among them stand for, in order; None where there are none.
    """

    tokens: list[int]
    generation: Generation | None = None
    vectors: Float[Tensor, "n c"] | None = None


class Batcher:
    """A running batch; :meth:`mmtp.decode.engine.Engine.batcher` gives one.

    Args:
        chooser: with the model.
        drafts: where drafts come from; None decodes plainly.
        exact: see the engine.
        draft_cost: likewise.
        max_lanes: rows at a time, where a guided row counts twice.
        context: tokens that a row may have, its prompt among them.
        kept: lanes more, for what rows that are done have left; it is found in lanes without a row as well.
        shared: tokens in common from which on rows share them; None shares nothing.
        chunk: see the engine.
        clock: likewise.
        experiences: with drafts, which batches of an engine share; None begins anew.

    Attributes:
        prompt_tokens: of all prompts that have got a lane.
        copied_tokens: of these, that were copied from other rows.
    """

    def __init__(
        self,
        chooser: Chooser,
        drafts: Drafts | None,
        *,
        exact: bool = False,
        draft_cost: float | None = None,
        max_lanes: int = 16,
        context: int = 4096,
        kept: int = 0,
        shared: int | None = SHARED,
        chunk: int = CHUNK,
        clock: Callable[[], float] = time.perf_counter,
        experiences: Experiences | None = None,
    ) -> None:
        for name, value, least in (("max_lanes", max_lanes, 1), ("context", context, 1), ("kept", kept, 0), ("shared", shared, 1)):
            if value is not None and value < least:
                raise DecodeError(f"{name} {value}: {least} or more is wanted")
        self.chooser, self.exact, self.draft_cost, self.chunk, self.clock = chooser, exact, draft_cost, chunk, clock
        self.max_lanes, self.context, self.kept, self.shared = max_lanes, context, kept, shared
        window, model = 1 + (drafts.length(chooser.model) if drafts else 0), chooser.model
        self._width = exact_width(window) if exact else 0
        self._most_forced = 0 if drafts is None else self._width - 1 if exact else window - 1 + FORCED_DRAFTS
        # A branch that has just begun reads a token more than a row.
        capacity = context + exact_width(max(window, self._width, 1 + self._most_forced) + 1)
        if model.flow is not None and model.flow.block:
            capacity += context  # rows stand in the passes of another's block as well, wherever they are
        self._ahead = 0 if model.next_scale is None else model.next_scale.ends[-1]  # queries for the next scale, behind what is read
        capacity += self._ahead
        lanes = max_lanes + kept
        self.cache = chooser.new_cache(model.config.backbone.num_caches, lanes, capacity, exact)
        self.drafter = drafts.begin(chooser, lanes, capacity, exact) if drafts and window > 1 else None
        self._keepers: list[KVCache | Drafter] = [self.cache, *([self.drafter] if self.drafter is not None else [])]
        self._hybrid = chooser.leaves_out_padding(exact) and (self.drafter is None or not self.drafter.pads)
        self.prompt_tokens = self.copied_tokens = 0
        self._number = 0
        self._experiences = Experiences() if experiences is None else experiences
        self._experiences.begin()
        self._waiting: deque[Row] = deque()
        self._ended: list[Row] = []
        self._rows: list[Row] = []
        self._reading: list[Row] = []  # rows whose prompts are being read
        self._lanes: list[Lane] = []  # of the rows, then of those that read; each stands at its index
        self._left: list[Row] = []  # rows that are done and whose lanes are not needed yet, the one of use latest last
        self._focus(0, 0)

    @property
    def busy(self) -> bool:
        """Whether rows run, wait, or have ended without :meth:`step` having said so."""
        return bool(self._rows or self._reading or self._waiting or self._ended)

    @torch.inference_mode()
    def submit(self, request: Request) -> Row:
        """Takes a request, which joins as soon as there is room for it.

        Returns:
            The row: ``tokens`` grow as it runs, ``done`` tells its end, ``generation`` what came of it.

        Raises:
            MmtpError: the request is not in order, see :class:`mmtp.decode.rows.Row`; no other row is touched.
        """
        pace = None if self.drafter is None else self._pace(request.sampling)
        row = Row(self.chooser.grammar, request, self._number, self.context, pace, self.chooser.model.next_scale, self.clock)
        if len(row.lanes) > self.max_lanes:
            raise DecodeError(f"row {row.number}: guidance takes two lanes, and max_lanes is {self.max_lanes}")
        self._number += 1
        (self._ended if row.done else self._waiting).append(row)
        return row

    def _pace(self, sampling: Sampling) -> Pace:
        """For a row that samples so. Where it judges by coupling, it drafts by the experience of all that sample alike."""
        coupled = sampling.verification == "coupling"
        experience = self._experiences.of(replace(sampling, seed=0)) if coupled else Experience()
        return Pace(self.chooser.costs, self.draft_cost, experience)

    @torch.inference_mode()
    def cancel(self, row: Row) -> None:
        """Ends a row at once; asking for its result raises from then on. One that has ended stays as it is."""
        if row.done:
            return
        row.done = row.cancelled = True
        if row in self._waiting:
            self._waiting.remove(row)
        else:
            self._release()
        row.finish()

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Lets rows join, reads a chunk of the prompts of those that have, and makes choices for all whose prompts are read.

        Returns:
            The rows that have ended since the last step, cancelled ones left out.
        """
        if self._waiting:
            self._admit()
        if not (self._reading and self._read()) and self._rows:
            self._pass(self._rows, self._lanes[: self._running])
            self._release()
        ended, self._ended = self._ended, []
        return ended

    def stream(self, row: Row) -> Generator[Piece]:
        """What comes of a row, as it settles; the others go on beside it. One that is closed before its end cancels the row.

        Raises:
            DecodeError: the row was cancelled.
        """
        pieces = self._pieces(row)
        next(pieces)  # so that closing one that was never asked cancels as well
        return pieces

    def _pieces(self, row: Row) -> Generator[Piece]:
        """First an empty piece, then what comes of a row."""
        told, written = row.prompt_length, 0
        try:
            yield Piece([])
            while True:
                if not row.done:
                    self.step()
                new, vectors, done = row.tokens[told:], row.written[written:], row.done
                told, written = told + len(new), written + len(vectors)
                if new or done:
                    yield Piece(new, row.generation if done else None, torch.stack(vectors) if vectors else None)
                if done:
                    return
        finally:
            self.cancel(row)

    @property
    def _running(self) -> int:
        """Lanes of rows whose prompts are read."""
        return sum(len(row.lanes) for row in self._rows)

    def _admit(self) -> None:
        """Gives lanes to rows that wait, first come, first served. One that could copy more once another's prompt is read waits for that,
        and others pass it by.
        """
        for row in list(islice(self._waiting, self.max_lanes)):
            if len(self._lanes) + len(row.lanes) > self.max_lanes:
                break
            source, common = self._source(row)
            if self._awaits(row, common):
                continue
            self._waiting.remove(row)
            row.stats.waited = self.clock() - row.begun
            self.prompt_tokens += len(row.tokens)
            self.copied_tokens += common
            self._claim(len(self._lanes), source, common)
            if source is not None and self.drafter is not None and common > source.settled - self.drafter.lookahead:
                row.settled = source.settled
            for lane in row.lanes:
                if lane is not row:
                    self._claim(len(self._lanes))
                lane.index, lane.reading = len(self._lanes), True
                self._lanes.append(lane)
            self._reading.append(row)

    def _read(self) -> bool:
        """A pass over the next chunks of prompts. Returns whether the rows that run took part."""
        running = self._lanes[: self._running] if self._hybrid else []
        rows, ends = self._chunks(running)
        if running and not rows:  # the cache has no room for both at once
            running = []
            rows, ends = self._chunks(running)
        first, count = self._running - len(running), len(running) + len(ends)
        lanes = self._lanes[first : first + count]
        for lane in lanes:
            lane.index -= first
        self._focus(first, count)
        self._pass([*self._rows, *rows] if running else rows, lanes, [len(lane.tokens) for lane in running] + ends)
        for lane in lanes:
            lane.index += first
        self._release()
        return bool(running)

    def _chunks(self, running: list[Lane]) -> tuple[list[Row], list[int]]:
        """The first of the rows that read, and of those after it as many as fit beside it and what runs; and how far each of their lanes is
        to be read. Alone, the first always fits.
        """
        most = max(self.chunk // (len(self._lanes) - self._running), 1)
        rows: list[Row] = []
        ends: list[int] = []
        begin = max((self.cache.held(lane.index) for lane in running), default=0)
        # Of what runs: the newest token, or two where a branch has just begun, and drafts.
        widest = max(self._width, 2 + self._most_forced) if running else 0
        for row in self._reading:
            starts = [self.cache.held(lane.index) for lane in row.lanes]
            stops = [start if lane.rests else lane.chunk_end(start, most) for lane, start in zip(row.lanes, starts, strict=True)]
            reading = any(stop < len(lane.tokens) and not lane.rests for lane, stop in zip(row.lanes, stops, strict=True))
            if reading:
                # The last tokens of row and branch are read together: they predict what comes next.
                stops = [a if b == len(lane.tokens) else b for lane, a, b in zip(row.lanes, starts, stops, strict=True)]
            begin, widest = max(begin, *starts), max(widest, *(b - a for a, b in zip(starts, stops, strict=True)))
            if (rows or running) and begin + exact_width(widest) + self._ahead > self.cache.limit:
                break
            for lane in row.lanes:
                lane.reading = reading
            rows.append(row)
            ends += stops
        return rows, ends

    def _source(self, row: Row) -> tuple[Row | None, int]:
        """The row that has most in common with one that waits, and how many tokens of it are worth a copy."""
        if self.shared is None or (row.branch is not None and row.branch.open):
            return None, 0
        source, most = None, self.shared - 1
        for other in (*self._rows, *self._reading, *self._left):
            held = self.cache.held(other.index)
            common = self._common(row, other, held if self.drafter is None else min(held, self.drafter.held(other.index)))
            if common > most:
                source, most = other, common
        return source, most if source is not None else 0

    def _awaits(self, row: Row, common: int) -> bool:
        """Whether another row, whose prompt is being read, is about to have so much more in common that a copy of that pays."""
        if self.shared is None or (row.branch is not None and row.branch.open):
            return False
        return any(self._common(row, other, other.prompt_length) >= common + self.shared for other in self._reading)

    def _common(self, row: Row, other: Row, held: int) -> int:
        """How much of a prompt another row holds, and a drafter what it needs of it."""
        if self.drafter is None:
            common = _common(row.tokens, other.tokens)
        else:
            # What a drafter keeps of what a row has written may come of drafts that did not stand. That costs a few drafts; where the
            # probabilities of drafts decide, it would cost the output.
            common = _common(row.tokens, other.tokens[: other.settled] if row.rejects else other.tokens) - self.drafter.lookahead
        common = row.alike(other, min(common, held, len(row.tokens) - 1))
        return common if all(keeper.keeps(other.index, common) for keeper in self._keepers) else 0

    def _claim(self, lane: int, source: Row | None = None, common: int = 0) -> None:
        """Makes the first free lane ready, with what is common with another row. What it has held moves on, unless that is the oldest."""
        here = next((row for row in self._left if row.index == lane), None)
        if here is not None:
            taken = {row.index for row in self._left}
            free = next((i for i in range(lane + 1, self.max_lanes + self.kept) if i not in taken), None)
            oldest = self._left.pop(0) if free is None else None
            target = lane if oldest is here else oldest.index if oldest is not None else free
            if target is not None and target != lane:
                self._swap(lane, target)
                here.index = target
                if oldest is not None:
                    oldest.index = lane
        for keeper in self._keepers:
            keeper.copy(lane if source is None else source.index, lane, common)
        if source in self._left:
            self._left.remove(source)
            self._left.append(source)

    def _release(self) -> None:
        """Rows that are done leave, those whose prompts are read run; their lanes come first, then those of rows that read."""
        there = [*self._rows, *self._reading]
        done = [row for row in there if row.done]
        self._rows = [row for row in there if not row.done and not row.reading]
        self._reading = [row for row in there if not row.done and row.reading]
        running = {lane for row in self._rows for lane in row.lanes}
        reading = [lane for row in self._reading for lane in row.lanes]
        for place in range(len(running) + len(reading)):
            here = self._lanes[place]
            if place >= len(running):
                other = reading[place - len(running)]  # in the order of the rows, the first of which are read together
            else:
                other = here if here in running else next(lane for lane in reversed(self._lanes) if lane in running)
            if other is not here:
                self._swap(place, other.index)
                self._lanes[place], self._lanes[other.index] = other, here
                here.index, other.index = other.index, place
        del self._lanes[len(running) + len(reading) :]
        self._focus(0, self._running)
        for row in done:
            row.finish()
            if self.shared is not None and self.cache.held(row.index) >= self.shared:
                self._left.append(row)
            if not row.cancelled:
                self._ended.append(row)

    def _swap(self, one: int, other: int) -> None:
        for keeper in self._keepers:
            keeper.swap(one, other)

    def _focus(self, first: int, count: int) -> None:
        for keeper in self._keepers:
            keeper.focus(first, count)

    def _pass(self, rows: list[Row], lanes: list[Lane], ends: Sequence[int] | None = None) -> None:
        """One pass over the window of every lane in focus; each row takes what it finds true, and drafts anew.

        Args:
            rows: of the pass.
            lanes: of the rows.
            ends: how far each lane is read, where not all are to their ends. A row that goes on reading takes nothing.
        """
        chooser, cache, drafter, starts = self.chooser, self.cache, self.drafter, self.cache.lengths
        for row in rows:
            if row.branch is not None and row.branch.fresh:
                row.branch.fresh = False
                starts[row.branch.index] = 0
                if drafter is not None:
                    drafter.restart(row.branch.index)
        ready = [row for row in rows if not row.reading]
        windows, places = [], []
        for lane, start, end in zip(lanes, starts, ends or [None] * len(lanes), strict=True):
            windows.append([] if lane.rests else lane.tokens[start:end] + lane.drafts)
            places.append([] if lane.rests else lane.positions[start:end] + lane.draft_positions)
        read = [len(window) for window in windows]
        due: dict[int, Due] = {}
        if chooser.model.next_scale is not None:
            due = {row.index: scale for row in ready if (scale := Due.of(chooser.model, row)) is not None}
            for scale in due.values():
                for lane in scale.row.lanes:
                    windows[lane.index] += [0] * len(scale)
                    places[lane.index] += scale.positions(lane)
        longest = max(map(len, windows))
        if self.exact:
            longest = max(self._width, exact_width(longest))
        mask = cache.begin(longest, chooser.widths(windows, self.exact))
        tokens = chooser.tensor([w + [0] * (longest - len(w)) for w in windows])
        positions = chooser.tensor([p + [(0, 0, 0)] * (longest - len(p)) for p in places])
        for lane, start in zip(lanes, starts, strict=True):
            oldest = cache.oldest(cache.first + lane.index)
            for first, end in lane.inputs:
                if start <= first and end <= start + read[lane.index]:
                    mask[lane.index, :, first - start : end - start, first - oldest : end - oldest] = True
        embedded = chooser.embed(tokens, lanes, starts)
        slots = [lane.window_slots(start, length) for lane, start, length in zip(lanes, starts, read, strict=True)]
        for scale in due.values():
            for lane in scale.row.lanes:
                scale.stand(lane, starts[lane.index], embedded, mask)
                slots[lane.index] += [scale.row.state.slot] * len(scale)
        seen = chooser.inputs_seen(lanes, starts, mask) if chooser.model.config.backbone.cross_attention_every else None
        hidden = chooser.model.extend(embedded, positions, mask, cache.layers, slots, seen)
        counts, writing = self._accept(ready, lanes, hidden, read, due)
        cache.commit(counts)
        for some in [[choice] for choice in writing] if self.exact else [writing] if writing else []:
            if chooser.model.flow.block:
                write_blocks(chooser, [choice.row for choice in some], cache, self.exact)
            else:
                write_tokens(chooser, hidden, some)
        if drafter is not None and not all(row.done for row in rows):
            # What rejection makes of a draft depends on the very q, so its rounding counts as well, and that of prompts, which rows share.
            least = MIN_EXACT_WIDTH if self.exact and (ends is not None or any(row.rejects for row in rows)) else 0
            one_by_one, begun = [row for row in ready if row.index not in due], self.clock()
            common = sum(not lane.reading for lane in self._lanes)
            for row in one_by_one:
                row.share_pass(common)
            drafter.propose(one_by_one, lanes, hidden, counts, least)
            seconds = self.clock() - begun
            for row in rows:
                row.stats.drafting += seconds
        if self._most_forced:
            for row in ready:
                if not row.done:
                    row.draft_forced(self._most_forced)

    def _accept(
        self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], read: list[int], due: dict[int, Due]
    ) -> tuple[list[int], list[Choice]]:
        """Every row takes its true choices.

        Args:
            rows: of the pass, those that go on reading left out.
            lanes: of the pass.
            hidden: its states.
            read: tokens that it has read of each lane, drafts among them.
            due: whole scales that are chosen in the place of tokens one by one.

        Returns:
            How many tokens each lane keeps of the pass, and the choices of vectors that are to be written.
        """
        last = [length - len(lane.drafts) - 1 for length, lane in zip(read, lanes, strict=True)]
        wanted: list[Choice] = []
        begins: list[int] = []
        for row in rows:
            begins.append(len(wanted))
            if row.index in due:
                wanted += due[row.index].choices(read)
                continue
            for j, state in enumerate(row.draft_states[:-1] if row.scale_due else row.draft_states):
                guide = None if row.branch is None else row.branch.guide(j, last[row.branch.index] + j)
                draft = row.proposals[j] if j < len(row.proposals) else None
                place = len(row.tokens) + j
                weight = 1.0 if guide is None else row.weight(state)
                wanted.append(Choice(row, last[row.index] + j, state.slot, place, guide, weight, draft, row.answer(j)))
        chosen = self.chooser.pick(hidden, wanted, self.exact)
        tokens = [choice.token for choice in chosen]
        counts, writing = [length if lane.reading else 0 for lane, length in zip(lanes, read, strict=True)], []
        for row, begin, end in zip(rows, begins, [*begins, len(wanted)][1:], strict=True):
            kept = 0
            if row.index in due:
                row.take_scale(tokens[begin:end])
                row.judged = []
            else:
                kept = row.accept(tokens[begin:end])
                row.judged = list(zip(wanted[begin:end], chosen[begin:end], strict=True))
            counts[row.index] = last[row.index] + 1 + kept
            if row.tokens[-1] == Special.FEATURE:
                writing.append(wanted[begin + row.stats.per_pass[-1] - 1])
            if row.branch is not None:
                if read[row.branch.index] and not row.branch.fresh:
                    counts[row.branch.index] = last[row.branch.index] + 1 + min(kept, len(row.branch.drafts))
                row.branch.forget_drafts()
            row.forget_drafts()
        return counts, writing


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of what two streams begin with in common, by halving: slices compare fast."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
