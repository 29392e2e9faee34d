"""Random requests that come and go, through a running batch, and the proof that each gets what it would get alone."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from mmtp.decode.constrain import Constraint
from mmtp.decode.engine import Engine
from mmtp.decode.rows import DecodeError, Request, Row
from mmtp.decode.sample import Sampling
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.vocab import Special
from mmtp.types import MmtpError, Modality


class Traffic:
    """Draws requests: lengths, seeds, samplings, guidance, constraints, stops; some that cannot be served.

    Args:
        grammar: of the model.
        seed: equal seeds draw equal requests.
        constraints: of which one in six takes one, where text may follow its prefix.
        longest: words of a prompt's opening at most. Openings recur.
        max_new_tokens: at most.
    """

    def __init__(
        self, grammar: StreamGrammar, seed: int = 0, constraints: Sequence[Constraint] = (), longest: int = 90, max_new_tokens: int = 32
    ) -> None:
        self.grammar, self.constraints, self.max_new_tokens = grammar, constraints, max_new_tokens
        self.random = np.random.default_rng(seed)
        self.openings = [self._words([Special.BOS, Special.USER], int(n)) for n in self.random.integers(1, longest, 12)]
        self._openers = [opener for opener, rule in grammar.rules.items() if grammar.layout.slots[grammar.turn].generates(opener)]
        self._said: list[list[int]] = []

    def remember(self, tokens: Sequence[int]) -> None:
        """A stream that later requests may go on from."""
        if self.grammar.begin(tokens).slot in (self.grammar.turn, self.grammar.doc):
            self._said = [*self._said[-7:], list(tokens)]

    def draw(self) -> Request:
        """One that can be served."""
        random, prefix = self.random, self._prefix()
        text = self.grammar.begin(prefix).slot in (self.grammar.turn, self.grammar.doc)
        constrained = text and len(self.constraints) and random.random() < 1 / 6
        guided = random.random() < 0.3
        sampling = Sampling(
            temperature=float(random.choice([0.0, 0.5, 1.0, 1.7])),
            top_k=int(random.choice([0, 0, 3])),
            top_p=float(random.choice([1.0, 1.0, 0.8])),
            min_p=float(random.choice([0.0, 0.0, 0.05])),
            guidance=float(random.choice([0.0, 1.5, 3.0])) if guided else 1.0,
            guidance_end=2.5 if guided and random.random() < 0.3 else None,
            repetition_penalty=float(random.choice([1.0, 1.0, 1.3])),
            seed=int(random.integers(1 << 32)),
            verification="rejection" if random.random() < 0.3 else "coupling",
            per_modality={Modality.TEXT: {"temperature": 0.7}} if random.random() < 0.2 else {},
        )
        return Request(
            prefix=prefix,
            sampling=sampling,
            max_new_tokens=int(random.integers(0, self.max_new_tokens + 1)),
            stop=(Special.END,) if random.random() < 0.5 else (),
            constraint=self.constraints[int(random.integers(len(self.constraints)))] if constrained else None,
        )

    def spoil(self, request: Request, context: int) -> Request:
        """One that cannot be served."""
        prefix = list(request.prefix)
        broken = (
            [],
            [*prefix[:2], Special.EOI, *prefix[2:]],
            [*prefix, self.grammar.layout.size + int(self.random.integers(1 << 20))],
            [-1, *prefix],
            self._words([Special.BOS], context),
        )[int(self.random.integers(5))]
        return Request(prefix=broken, sampling=request.sampling)

    def _words(self, tokens: Sequence[int], count: int) -> list[int]:
        return [*tokens, *self.random.integers(*self.grammar.layout.text_range, count).tolist()]

    def _prefix(self) -> list[int]:
        """An opening, or what was said before; more words; and perhaps the beginning of an answer, a picture's among them."""
        random = self.random
        if self._said and random.random() < 0.2:
            prefix = [*self._said[int(random.integers(len(self._said)))]]
            prefix += [*([Special.END] if self.grammar.begin(prefix).slot == self.grammar.turn else []), Special.USER]
        else:
            prefix = list(self.openings[int(random.integers(len(self.openings)))])
        prefix = self._words(prefix, int(random.choice([0, 1, 9, 30])))
        if random.random() < 0.8:
            prefix += [Special.END, Special.ASSISTANT]
            if self._openers and random.random() < 0.4:
                prefix = self._span(prefix)
        return prefix

    def _span(self, prefix: list[int]) -> list[int]:
        """With the beginning of a small span."""
        prefix = [*prefix, int(self.random.choice(self._openers))]
        state = self.grammar.begin(prefix)
        for _ in range(int(self.random.integers(0, 12))):
            slot = self.grammar.layout.slots[state.slot]
            low, high = slot.generable[0]
            token = low + int(self.random.integers(1, 5)) if state.slot == self.grammar.dim else int(self.random.integers(low, high))
            prefix.append(slot.forced if slot.forced is not None else token)
            state.push(prefix[-1])
            if not state.in_span:
                break
        return prefix


def stir(model: nn.Module, std: float = 0.3) -> None:
    """Random weights under which every token of an untrained model hangs on all before it, so that nothing goes wrong unseen."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)


@dataclass
class Traced:
    """What became of random requests.

    Attributes:
        ended: that ran to their end.
        cancelled: that were told to end.
        refused: that could not be served, and each got its error.
        unequal: requests whose output is not that of their solo run.
        tokens: new ones, of all rows.
        steps: of the batch.
        prompt_tokens: of all prompts.
        copied_tokens: of them, that were copied from other rows.
        seconds: that the batch ran.
        solo_seconds: that the solo runs took.
        cache_bytes: of the cache, after the first tenth and at the end.
        resident: bytes of the process, likewise.
    """

    ended: int = 0
    cancelled: int = 0
    refused: int = 0
    unequal: list[Request] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    copied_tokens: int = 0
    seconds: float = 0.0
    solo_seconds: float = 0.0
    cache_bytes: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)


def trace(
    engine: Engine,
    traffic: Traffic,
    count: int,
    *,
    max_lanes: int = 8,
    context: int = 512,
    kept: int = 4,
    shared: int = 8,
    alone: Engine | None = None,
) -> Traced:
    """Sends random requests through a batch, at random times, and each that was served through an engine alone.

    Args:
        engine: in exact mode, in which tokens are promised to be equal.
        traffic: of requests.
        count: of requests.
        max_lanes: see :meth:`mmtp.decode.engine.Engine.batcher`.
        context: likewise.
        kept: likewise.
        shared: likewise.
        alone: of the same model, where it is not the same engine that decodes requests alone.
    """
    found, random = Traced(), traffic.random
    batcher = engine.batcher(max_lanes=max_lanes, context=context, kept=kept, shared=shared)
    running: dict[Row, Request] = {}
    sent, tenth = 0, math.ceil(count / 10)
    while sent < count or running:
        begun = time.perf_counter()
        for _ in range(min(int(random.poisson(0.7)), count - sent)):
            sent += 1
            request = traffic.draw()
            if len(request.prefix) >= context:
                request = Request(prefix=request.prefix[:2], sampling=request.sampling)
            if random.random() < 0.03:
                try:
                    batcher.submit(traffic.spoil(request, context))
                except MmtpError:
                    found.refused += 1
            else:
                running[batcher.submit(request)] = request
            if sent in (tenth, count):
                found.resident.append(resident())
                found.cache_bytes.append(batcher.cache.storage.nbytes)
        ended = batcher.step()
        found.steps += 1
        if running and random.random() < 0.03:
            row = list(running)[int(random.integers(len(running)))]
            if not row.done:
                batcher.cancel(row)
                ended.append(row)
        found.seconds += time.perf_counter() - begun
        for row in ended:
            _compare(alone or engine, row, running.pop(row), context, found)
            if not row.cancelled:
                traffic.remember(row.tokens)
    found.prompt_tokens, found.copied_tokens = batcher.prompt_tokens, batcher.copied_tokens
    return found


def _compare(engine: Engine, row: Row, request: Request, context: int, found: Traced) -> None:
    begun = time.perf_counter()
    limit = min(request.max_new_tokens, context - len(request.prefix))
    alone = engine.generate(request.prefix, request.sampling, limit, stop=request.stop, constraint=request.constraint)
    found.solo_seconds += time.perf_counter() - begun
    found.tokens += len(row.tokens) - row.prompt_length
    if row.cancelled:
        found.cancelled += 1
        equal = row.tokens == alone.tokens[: len(row.tokens)] and _raises(row)
    else:
        found.ended += 1
        got = row.generation
        equal = (got.tokens, got.cut, got.failure) == (alone.tokens, alone.cut, alone.failure)
    if not equal:
        found.unequal.append(request)


def _raises(row: Row) -> bool:
    try:
        row.generation  # noqa: B018
    except DecodeError:
        return True
    return False


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
