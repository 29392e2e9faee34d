"""The decoding loop: propose, verify, accept. It knows token ids, slots and a Step; nothing of pictures or sound.

A round reads a window per row: the token chosen last, and the drafts that the head proposes to follow it. One pass of the model
gives the true choice after each of them; drafts are kept as long as they equal it (Leviathan et al. 2023, section 2, with
equality in place of the ratio, since draft and target are drawn with the same noise), and the first true choice that differs is
kept as well. So each round yields at least one token, and the stream is the one that plain decoding gives. Plain decoding is the
same loop with no drafts.

Rounding can differ between matrix kernels for one row and for several. In *exact* mode every pass is padded to one width, plain
or speculative, so both run the same kernels on the same shapes and the promise holds bit for bit. Outside of it plain decoding
uses single-row kernels: faster, and equal up to ties within rounding.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.decode.cache import KVCache
from mmtp.decode.sample import Noise, Sampling, choose
from mmtp.decode.step import SlotLogits, Step
from mmtp.stream.grammar import GrammarState, StreamGrammar
from mmtp.types import MmtpError

MIN_EXACT_WIDTH = 4  # from four rows on, matrix kernels give each row the same result whatever the number of rows


class DecodeError(MmtpError):
    """A request that cannot be decoded: names the row and what to change."""


@dataclass
class DecodeStats:
    """What a generation cost. Keys are (modality of the drafted token, offset from 1).

    Attributes:
        per_pass: tokens that each pass of the backbone produced, the prompt's first.
        seconds: wall-clock time.
        drafted: drafts proposed.
        accepted: drafts that stood, with all drafts before them.
    """

    per_pass: list[int] = field(default_factory=list)
    seconds: float = 0.0
    drafted: Counter[tuple[str, int]] = field(default_factory=Counter)
    accepted: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def generated(self) -> int:
        """Tokens produced."""
        return sum(self.per_pass)

    @property
    def passes(self) -> int:
        """Passes of the backbone that produced them."""
        return len(self.per_pass)

    @property
    def tokens_per_pass(self) -> float:
        return self.generated / max(1, self.passes)


@dataclass(frozen=True)
class Generation:
    """A finished row.

    Attributes:
        tokens: the prompt and what follows it.
        prompt_length: where the new tokens begin.
        stats: of this row; ``seconds`` are those of its batch.
    """

    tokens: list[int]
    prompt_length: int
    stats: DecodeStats

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]


class _Row:
    """One request on its way."""

    def __init__(self, grammar: StreamGrammar, index: int, prefix: Sequence[int], sampling: Sampling, limit: int) -> None:
        self.index = index
        self.sampling = sampling
        self.noise = Noise(sampling.seed)
        self.state = grammar.begin()
        self.tokens: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        for token in prefix:
            self.positions.append(self.state.push(token))
            self.tokens.append(token)
        self.end = len(prefix) + limit
        self.done = limit == 0 or self.state.done
        self.stats = DecodeStats()
        self.forget_drafts()

    def forget_drafts(self) -> None:
        self.drafts: list[int] = []
        self.draft_positions: list[tuple[int, int, int]] = []
        self.draft_states: list[GrammarState] = [self.state]  # [j]: the state after j drafts

    def push(self, token: int, stop: Collection[int]) -> None:
        """Keeps a token for good."""
        self.positions.append(self.state.push(token))
        self.tokens.append(token)
        self.done = token in stop or self.state.done or len(self.tokens) >= self.end


class Engine:
    """Decodes streams with a model, plainly or speculatively.

    Args:
        model: in evaluation mode.
        exact: pad every pass to one width, so that plain and speculative output are equal bit for bit.
    """

    def __init__(self, model: Step, *, exact: bool = False) -> None:
        self.model = model
        self.exact = exact
        self.grammar = StreamGrammar(model.config.layout)
        self.logits = SlotLogits(model.config.layout, model.unembedding.weight)
        self.slots = model.config.layout.slots
        self.device, self.dtype = model.unembedding.weight.device, model.unembedding.weight.dtype

    def generate(
        self,
        prefix: Sequence[int],
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
        speculative: bool = True,
        stop: Collection[int] = (),
    ) -> Generation:
        """Goes on from a prefix until a stop token, the end of the document, or the limit.

        Args:
            prefix: the start of a legal stream, at least one token.
            sampling: how tokens are chosen; the default samples at temperature 1 with seed 0.
            max_new_tokens: limit.
            speculative: draft with the model's head; the output is the same, sooner.
            stop: ids after which to end.

        Raises:
            GrammarError: the prefix breaks the grammar; names the offset.
            DecodeError: the prefix is empty or a limit is negative.
        """
        return self.generate_batch([prefix], [sampling or Sampling()], max_new_tokens, speculative, stop)[0]

    @torch.inference_mode()
    def generate_batch(
        self,
        prefixes: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        max_new_tokens: int = 512,
        speculative: bool = True,
        stop: Collection[int] = (),
    ) -> list[Generation]:
        """As :meth:`generate` for several rows of any lengths; each ends, and accepts drafts, by itself."""
        if max_new_tokens < 0:
            raise DecodeError(f"max_new_tokens {max_new_tokens}: 0 or more is wanted")
        for i, prefix in enumerate(prefixes):
            if not prefix:
                raise DecodeError(f"row {i}: the prefix is empty; a stream starts with <bos>")
        begun = time.perf_counter()
        rows = [_Row(self.grammar, i, p, s, max_new_tokens) for i, (p, s) in enumerate(zip(prefixes, samplings, strict=True))]
        depth = self.model.head.mtp_depth if speculative else 0
        width = max(MIN_EXACT_WIDTH, self.model.head.mtp_depth + 1) if self.exact else 0
        capacity = max((len(p) for p in prefixes), default=0) + max_new_tokens + max(depth + 1, width)
        cache = self._cache(self.model.config.backbone.depth, len(rows), capacity)
        drafter = Drafter(self, self._cache(self.model.head.num_caches, len(rows), capacity), depth) if depth else None
        while not all(row.done for row in rows):
            self._round(rows, cache, drafter, width, stop)
        seconds = time.perf_counter() - begun
        for row in rows:
            row.stats.seconds = seconds
        return [Generation(row.tokens, len(p), row.stats) for row, p in zip(rows, prefixes, strict=True)]

    def _cache(self, layers: int, rows: int, capacity: int) -> KVCache:
        backbone = self.model.config.backbone
        return KVCache(layers, rows, backbone.num_kv_heads, backbone.head_dim, capacity, self.device, self.dtype)

    def _round(self, rows: list[_Row], cache: KVCache, drafter: "Drafter | None", width: int, stop: Collection[int]) -> None:
        """One pass over the window of every row."""
        windows = [[] if row.done else row.tokens[cache.lengths[row.index] :] + row.drafts for row in rows]
        places = [[] if row.done else row.positions[cache.lengths[row.index] :] + row.draft_positions for row in rows]
        longest = max(width, max(map(len, windows)))
        mask = cache.begin(longest)
        tokens = self.tensor([w + [0] * (longest - len(w)) for w in windows])
        positions = self.tensor([p + [(0, 0, 0)] * (longest - len(p)) for p in places])
        hidden = self.model.extend(tokens, positions, mask, cache.layers)
        wanted = []  # (row, index into the window whose state predicts, slot, place in the stream)
        for row, window in zip(rows, windows, strict=True):
            last = len(window) - len(row.drafts) - 1
            for j, state in enumerate(row.draft_states if window else []):
                wanted.append((row, last + j, state.slot, len(row.tokens) + j))
        chosen = iter(self.pick(self.model.backbone.norm, hidden, wanted, self.exact))
        counts = []
        for row, window in zip(rows, windows, strict=True):
            truths = [next(chosen) for _ in row.draft_states] if window else []
            kept = self._accept(row, truths, stop) if window else 0
            counts.append(len(window) - len(row.drafts) + kept if window else 0)
            row.forget_drafts()
        cache.commit(counts)
        if drafter is not None and not all(row.done for row in rows):
            drafter.propose(rows, hidden[:, : max(counts)], counts)

    @staticmethod
    def _accept(row: _Row, truths: list[int], stop: Collection[int]) -> int:
        """Keeps true choices up to the first that differs from its draft; returns how many drafts stood."""
        before, kept = len(row.tokens), 0
        for j, truth in enumerate(truths):
            row.push(truth, stop)
            if j == len(row.drafts) or truth != row.drafts[j]:
                break
            kept += 1
            if row.done:
                break
        row.stats.per_pass.append(len(row.tokens) - before)
        for j in range(len(row.drafts)):
            key = str(row.draft_states[j].modality), j + 1
            row.stats.drafted[key] += 1
            row.stats.accepted[key] += j < kept
        row.noise.forget_before(len(row.tokens))
        return kept

    def pick(self, norm: Any, hidden: Float[Tensor, "b s d"], wanted: list[tuple[_Row, int, int, int]], exact: bool = False) -> list[int]:
        """Chooses a token at every wanted place; logits are taken over each slot's legal ids alone.

        Args:
            norm: applied to the states first.
            hidden: states of the pass.
            wanted: (row, index into the pass, slot, place in the stream).
            exact: take at least as many rows at a time as make the kernels agree; drafts need not.
        """
        tokens = [0] * len(wanted)
        by_slot: dict[int, list[int]] = defaultdict(list)
        for i, (_, _, slot, _) in enumerate(wanted):
            if (forced := self.slots[slot].forced) is None:
                by_slot[slot].append(i)
            else:
                tokens[i] = forced
        for slot, members in by_slot.items():
            states = norm(hidden[[wanted[i][0].index for i in members], [wanted[i][1] for i in members]])
            missing = max(0, MIN_EXACT_WIDTH - len(members)) if exact else 0
            logits = iter(self.logits(torch.nn.functional.pad(states, (0, 0, 0, missing)), slot).split(1))
            for row, group in groupby(members, key=lambda i: wanted[i][0]):
                own = list(group)
                scores = torch.cat([next(logits) for _ in own])
                for i, local in zip(own, choose(scores, row.sampling, row.noise, [wanted[i][3] for i in own]), strict=True):
                    tokens[i] = self.logits.token(slot, local)
        return tokens

    def tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self.device)


class Drafter:
    """Proposes tokens with the model's head.

    Anchors are the positions whose hidden states are known. Depth k reads x[t+k] at every new anchor t; the newest anchor's state
    then draws the draft. The head's own cache advances with the anchors; where a later token was drafted wrongly, depths beyond
    the first keep what they read, which costs a little acceptance around a rejection and never the result.

    Args:
        engine: gives model, logits and grammar.
        cache: of the head's layers.
        depth: tokens to propose at most.
    """

    def __init__(self, engine: Engine, cache: KVCache, depth: int) -> None:
        self.engine, self.cache, self.depth = engine, cache, depth

    def propose(self, rows: list[_Row], hidden: Float[Tensor, "b s d"], counts: list[int]) -> None:
        """Fills ``drafts`` of every row that goes on.

        Args:
            rows: with the token chosen last as the end of ``tokens``.
            hidden: states of the anchors that the last pass added, padded at the end.
            counts: how many anchors each row has added.
        """
        engine, model = self.engine, self.engine.model
        width = hidden.shape[1]
        mask = self.cache.begin(width)
        state = hidden
        open_rows = [row for row in rows if not row.done]
        for k in range(1, self.depth + 1):
            tokens, positions = [], []
            for row, count in zip(rows, counts, strict=True):
                first = self.cache.lengths[row.index] + k
                have = len(row.tokens)
                window = (row.tokens[first:] + row.drafts[max(0, first - have) :])[:count]
                place = (row.positions[first:] + row.draft_positions[max(0, first - have) :])[:count]
                tokens.append(window + [0] * (width - len(window)))
                positions.append(place + [(0, 0, 0)] * (width - len(place)))
            embedded = model.embed(engine.tensor(tokens))
            state, out = model.head.draft(k, state, embedded, engine.tensor(positions), mask, self.cache.layers)
            # A row drafts on as long as its stream goes on and its limit leaves room for the token that verification adds.
            open_rows = [r for r in open_rows if not r.draft_states[-1].done and len(r.tokens) + k < r.end]
            if not open_rows:
                break
            wanted = [(row, counts[row.index] - 1, row.draft_states[-1].slot, len(row.tokens) + k - 1) for row in open_rows]
            for row, token in zip(open_rows, engine.pick(_identity, out, wanted), strict=True):
                after = row.draft_states[-1].copy()
                row.draft_positions.append(after.push(token))
                row.drafts.append(token)
                row.draft_states.append(after)
        self.cache.commit(counts)


def _identity(states: Tensor) -> Tensor:
    return states
