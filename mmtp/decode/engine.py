"""The decoding loop: propose, verify, accept. It knows token ids, slots and a Step; nothing of pictures or sound.

A round reads a window per row: the token chosen last, and the drafts that the head proposes to follow it. One pass of the model
gives the true choice after each of them; drafts are kept as long as they equal it (Leviathan et al. 2023, section 2, with
equality in place of the ratio, since draft and target are drawn with the same noise), and the first true choice that differs is
kept as well. So each round yields at least one token, and the stream is the one that plain decoding gives. Plain decoding is the
same loop with no drafts. A request may have its drafts judged by rejection sampling instead: then the choice after a draft depends
on it (:func:`mmtp.decode.sample.judge`), the rest of the round is the same, and the stream has plain decoding's distribution.

Rounding can differ between matrix kernels for one row and for several. In *exact* mode every pass is padded to one width, plain
or speculative, so both run the same kernels on the same shapes and the promise holds bit for bit. Outside of it plain decoding
uses single-row kernels: faster, and equal up to ties within rounding.

A guided row (classifier-free guidance) carries a second row of the batch, its unconditional branch, which reads the same tokens
and drafts. Both sides are mixed before any choice, of drafts as of true tokens: so guidance costs rows, and nothing of the promise.
"""

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmtp.decode.cache import KVCache
from mmtp.decode.constrain import Constraint
from mmtp.decode.drafts import Drafter, Drafts, HeadDrafts
from mmtp.decode.pace import Pace
from mmtp.decode.rows import Choice, Lane, Row
from mmtp.decode.sample import Draft, Sampling, choose, gaussian, penalize, propose
from mmtp.decode.scales import Due
from mmtp.decode.stats import Generation
from mmtp.decode.step import SlotLogits, Step
from mmtp.nn.linear import pack_linears
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.vocab import Special
from mmtp.types import MmtpError

MIN_EXACT_WIDTH = 4  # from four rows on, matrix kernels give each row the same result whatever the number of rows


FORCED_DRAFTS = 16  # tokens without a choice that may follow the drafts of a pass


class DecodeError(MmtpError):
    """A request that cannot be decoded: names the row and what to change."""


class Engine:
    """Decodes streams with a model, plainly or speculatively.

    Args:
        model: in evaluation mode.
        exact: pad every pass to one width, so that plain and speculative output are equal bit for bit, and rows of a batch equal those
            decoded alone.
        drafts: where drafts come from; the model's head where none are given.
        draft_cost: what one more draft costs, made and verified, in passes of the model. Each row then makes as many as pay
            (:class:`mmtp.decode.pace.Pace`); None makes all there are.
    """

    def __init__(self, model: Step, *, exact: bool = False, drafts: Drafts | None = None, draft_cost: float | None = None) -> None:
        if draft_cost is not None and not 0 <= draft_cost < float("inf"):
            raise DecodeError(f"draft_cost {draft_cost}: a number from 0 up is wanted")
        self.model = model
        self.exact, self.draft_cost = exact, draft_cost
        self.drafts = drafts or HeadDrafts()
        self.window = 1 + self.drafts.length(model)
        self.grammar = StreamGrammar(model.config.layout)
        self.logits = SlotLogits(model.config.layout, model.unembedding.weight)
        self.slots = model.config.layout.slots
        if isinstance(model, torch.nn.Module):
            pack_linears(model)
        self.device, self.dtype = model.unembedding.weight.device, model.unembedding.weight.dtype

    def generate(
        self,
        prefix: Sequence[int],
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
        speculative: bool = True,
        stop: Collection[int] = (),
        vectors: Float[Tensor, "n d"] | None = None,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Goes on from a prefix until a stop token, the end of the document, or the limit.

        Args:
            prefix: the start of a legal stream, at least one token.
            sampling: how tokens are chosen; the default samples at temperature 1 with seed 0.
            max_new_tokens: limit.
            speculative: use drafts; the output is the same, sooner.
            stop: ids after which to end.
            vectors: what the ``<feature>`` tokens of the prefix stand for, in order, in the model's width.
            constraint: what the new tokens must meet. They are text then, up to the token that ends the turn (or the document, outside
                of turns), and the row ends with it. The limit may cut them before; ``cut`` tells.

        Raises:
            GrammarError: the prefix breaks the grammar; names the offset.
            DecodeError: the prefix is empty or a limit is negative.
            FeaturesError: the prefix has other places for vectors.
            ConstraintError: no text may follow the prefix, or the constraint was compiled for another vocabulary.
        """
        return self.generate_batch([prefix], [sampling or Sampling()], max_new_tokens, speculative, stop, [vectors], [constraint])[0]

    @torch.inference_mode()
    def generate_batch(
        self,
        prefixes: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        max_new_tokens: int = 512,
        speculative: bool = True,
        stop: Collection[int] = (),
        vectors: Sequence[Float[Tensor, "_ d"] | None] | None = None,
        constraints: Sequence[Constraint | None] | None = None,
    ) -> list[Generation]:
        """As :meth:`generate` for several rows of any lengths; each ends, and accepts drafts, by itself."""
        if max_new_tokens < 0:
            raise DecodeError(f"max_new_tokens {max_new_tokens}: 0 or more is wanted")
        for i, prefix in enumerate(prefixes):
            if not prefix:
                raise DecodeError(f"row {i}: the prefix is empty; a stream starts with <bos>")
        begun = time.perf_counter()
        guided = [i for i, sampling in enumerate(samplings) if sampling.guided]
        cost = self.draft_cost
        branch_index = {i: len(prefixes) + n for n, i in enumerate(guided)}
        nothing = [None] * len(prefixes)
        rows = [
            Row(
                self.grammar,
                i,
                p,
                s,
                max_new_tokens,
                branch_index.get(i, -1),
                v,
                c,
                None if cost is None else Pace(cost),
                self.model.next_scale,
            )
            for i, (p, s, v, c) in enumerate(zip(prefixes, samplings, vectors or nothing, constraints or nothing, strict=True))
        ]
        lanes: list[Lane] = [*rows, *(row.branch for row in rows if row.branch is not None)]
        width = max(MIN_EXACT_WIDTH, self.window) if self.exact else 0
        forced = max(self.window, width) - 1 + (0 if self.exact else FORCED_DRAFTS) if speculative else 0
        capacity = max((len(p) for p in prefixes), default=0) + max_new_tokens + max(self.window, width, 1 + forced)
        if self.model.flow is not None and self.model.flow.block:
            capacity += max_new_tokens  # rows that rest stand in the passes of a block as well, wherever they are
        if self.model.next_scale is not None:
            capacity += self.model.next_scale.ends[-1]  # a scale that is read, and queries for the next one
        cache = self.new_cache(self.model.config.backbone.num_caches, len(lanes), capacity)
        drafter = self.drafts.begin(self, len(lanes), capacity) if speculative and self.window > 1 else None
        while not all(row.done for row in rows):
            self._round(rows, lanes, cache, drafter, width, stop)
            for row in rows:
                if not row.done:
                    row.draft_forced(forced)
        seconds = time.perf_counter() - begun
        for row in rows:
            row.stats.seconds = seconds
        return [
            Generation(row.tokens, len(p), row.stats, torch.stack(row.written) if row.written else None, row.cut, row.failure)
            for row, p in zip(rows, prefixes, strict=True)
        ]

    def new_cache(self, layers: int, rows: int, capacity: int) -> KVCache:
        """A cache for so many layers with keys and values of the backbone's shape."""
        backbone = self.model.config.backbone
        return KVCache(layers, rows, backbone.num_kv_heads, backbone.head_dim, capacity, self.device, self.dtype)

    def _round(
        self, rows: list[Row], lanes: list[Lane], cache: KVCache, drafter: Drafter | None, width: int, stop: Collection[int]
    ) -> None:
        """One pass over the window of every lane."""
        for row in rows:
            if row.branch is not None and row.branch.fresh:
                row.branch.fresh = False
                cache.lengths[row.branch.index] = 0
                if drafter is not None:
                    drafter.restart(row.branch.index)
        due = {row.index: scale for row in rows if not row.done and (scale := Due.of(self.model, row)) is not None}
        if self.exact:  # each scale has a pass of its own, so that its shapes are those of the row alone
            due = dict(list(due.items())[:1])
        waiting = set(range(len(rows))) - due.keys() if self.exact and due else set()
        waiting |= {row.index for row in rows if row.done}
        resting = waiting | {row.branch.index for row in rows if row.branch is not None and (row.index in waiting or not row.branch.open)}
        windows = [[] if lane.index in resting else lane.tokens[cache.lengths[lane.index] :] + lane.drafts for lane in lanes]
        places = [[] if lane.index in resting else lane.positions[cache.lengths[lane.index] :] + lane.draft_positions for lane in lanes]
        read = {lane.index: len(window) for lane, window in zip(lanes, windows, strict=True)}
        for scale in due.values():
            for lane in scale.row.lanes:
                windows[lane.index] += [0] * len(scale)
                places[lane.index] += scale.positions(lane)
        longest = max(width, max(map(len, windows)))
        mask = cache.begin(longest)
        tokens = self.tensor([w + [0] * (longest - len(w)) for w in windows])
        positions = self.tensor([p + [(0, 0, 0)] * (longest - len(p)) for p in places])
        for lane in lanes:
            begin = cache.lengths[lane.index]
            for first, end in lane.inputs:
                if first >= begin and lane.index not in resting:
                    mask[lane.index, :, first - begin : end - begin, first:end] = True
        embedded = self.embed(tokens, lanes, cache.lengths)
        slots = [lane.window_slots(cache.lengths[lane.index], read[lane.index]) for lane in lanes]
        for scale in due.values():
            for lane in scale.row.lanes:
                scale.stand(lane, cache.lengths[lane.index], embedded, mask)
                slots[lane.index] += [scale.row.state.slot] * len(scale)
        seen = self._inputs_seen(lanes, cache.lengths, mask) if self.model.config.backbone.cross_attention_every else None
        hidden = self.model.extend(embedded, positions, mask, cache.layers, slots, seen)
        last = [read[lane.index] - len(lane.drafts) - 1 for lane in lanes]
        wanted = []
        going = [row for row in rows if row.index not in waiting]
        for row in going:
            if row.index in due:
                wanted += due[row.index].choices(read)
                continue
            for j, state in enumerate(row.draft_states[:-1] if row.scale_due else row.draft_states):
                guide = None if row.branch is None else row.branch.guide(j, last[row.branch.index] + j)
                draft = row.proposals[j] if j < len(row.proposals) else None
                place = len(row.tokens) + j
                wanted.append(Choice(row, last[row.index] + j, state.slot, place, guide, row.weight(state), draft, row.answer(j)))
        chosen: dict[int, list[int]] = defaultdict(list)
        for choice, token in zip(wanted, self.pick(self.model.backbone.norm, hidden, wanted, self.exact), strict=True):
            chosen[choice.row.index].append(token)
        choices = {(choice.row.index, choice.place): choice for choice in wanted}
        writing: list[Choice] = []
        counts = [0] * len(lanes)
        for row in going:
            kept = 0
            if row.index in due:
                row.take_scale(chosen[row.index], stop)
            else:
                kept = row.accept(chosen[row.index], stop)
            counts[row.index] = last[row.index] + 1 + kept
            if row.tokens[-1] == Special.FEATURE:
                writing.append(choices[row.index, len(row.tokens) - 1])
            if row.branch is not None:
                if windows[row.branch.index] and not row.branch.fresh:
                    counts[row.branch.index] = last[row.branch.index] + 1 + min(kept, len(row.branch.drafts))
                row.branch.forget_drafts()
            row.forget_drafts()
        cache.commit(counts)
        for some in [[choice] for choice in writing] if self.exact else [writing] if writing else []:
            if self.model.flow.block:
                self._write_blocks([choice.row for choice in some], cache, stop)
            else:
                self._write(hidden, some)
        if drafter is not None and any(counts) and not all(row.done for row in rows):
            # What rejection makes of a draft depends on the very q, so its rounding counts as well.
            least = MIN_EXACT_WIDTH if self.exact and any(row.sampling.verification == "rejection" for row in rows) else 0
            one_by_one = [row for row in going if row.index not in due]
            begun = time.perf_counter()
            drafter.propose(one_by_one, lanes, hidden[:, : max(least, *counts)], counts, least)
            seconds = time.perf_counter() - begun
            for row in rows:
                row.stats.drafting += seconds

    def pick(self, norm: Any, hidden: Float[Tensor, "b s d"], wanted: list[Choice], exact: bool = False) -> list[int]:
        """Chooses a token at every wanted place.

        Args:
            norm: applied to the states first.
            hidden: states of the pass.
            wanted: where.
            exact: take at least as many rows at a time as make the kernels agree.
        """
        tokens = [self._forced(choice) or 0 for choice in wanted]
        for row, slot, own, scores in self.scores(norm, hidden, wanted, exact):
            settings, places = row.sampling.of(self.slots[slot].modality), [wanted[i].place for i in own]
            drafts = [None if (d := wanted[i].draft) is None else d._replace(token=self.logits.local(slot, d.token)) for i in own]
            for i, local in zip(own, choose(scores, settings, row.noise, places, drafts), strict=True):
                tokens[i] = self.logits.token(slot, local)
        return tokens

    def propose(self, norm: Any, hidden: Float[Tensor, "b s d"], wanted: list[Choice], exact: bool = False) -> list[Draft]:
        """Drafts a token at every wanted place; arguments are those of :meth:`pick`."""
        proposed = [Draft(self._forced(choice) or 0) for choice in wanted]
        for row, slot, own, scores in self.scores(norm, hidden, wanted, exact):
            withheld = [self.logits.local(slot, token) for token in row.withheld if self.slots[slot].generates(token)]
            settings, places = row.sampling.of(self.slots[slot].modality), [wanted[i].place for i in own]
            for i, draft in zip(own, propose(scores, settings, row.noise, places, len(row.tokens), withheld), strict=True):
                proposed[i] = draft._replace(token=self.logits.token(slot, draft.token))
        return proposed

    def _forced(self, choice: Choice) -> int | None:
        """The one id that grammar and constraint leave at a place, if they leave only one."""
        return self.slots[choice.slot].forced if choice.answer is None else choice.answer.forced

    def scores(
        self, norm: Any, hidden: Float[Tensor, "b s d"], wanted: list[Choice], exact: bool
    ) -> Iterator[tuple[Row, int, list[int], Float[Tensor, "m n"]]]:
        """Logits at the wanted places, after guidance and penalty, over each slot's legal ids alone.

        Places with only one legal id are left out.

        Yields:
            A row, a slot, indices of the row's places of that slot, and their logits.
        """
        by_slot: dict[int, list[int]] = defaultdict(list)
        for i, choice in enumerate(wanted):
            if self._forced(choice) is None:
                by_slot[choice.slot].append(i)
        for slot, members in by_slot.items():
            at = [(wanted[i].row.index, wanted[i].column) for i in members]
            guided = [n for n, i in enumerate(members) if wanted[i].guide is not None]
            at += [guide for i in members if (guide := wanted[i].guide) is not None]
            states = norm(hidden[[lane for lane, _ in at], [column for _, column in at]])
            missing = max(0, MIN_EXACT_WIDTH - len(at)) if exact else 0
            logits = self.logits(torch.nn.functional.pad(states, (0, 0, 0, missing)), slot)
            if guided:
                scale = torch.tensor([[wanted[members[n]].weight] for n in guided], device=logits.device, dtype=logits.dtype)
                logits[guided] = torch.lerp(logits[len(members) : len(at)], logits[guided], scale)
            for n, i in enumerate(members):
                if (answer := wanted[i].answer) is not None:
                    logits[n, ~self.logits.among(slot, answer.legal).to(logits.device)] = float("-inf")
            each = iter(logits.split(1))
            for row, group in groupby(members, key=lambda i: wanted[i].row):
                own = list(group)
                scores = torch.cat([next(each) for _ in own])
                if row.sampling.repetition_penalty != 1 and (text := self.logits.text(slot)).stop:
                    seen = row.seen([wanted[i].place for i in own]).to(scores.device)
                    scores[:, text] = penalize(scores[:, text], seen, row.sampling.repetition_penalty)
                yield row, slot, own, scores

    def _write(self, hidden: Float[Tensor, "b s d"], choices: list[Choice]) -> None:
        """Draws the vectors of new ``<feature>`` tokens from the states before them."""
        norm, width = self.model.backbone.norm, self.model.config.feature_width
        guides = [choice.guide or (choice.row.index, choice.column) for choice in choices]
        states = norm(hidden[[choice.row.index for choice in choices], [choice.column for choice in choices]])
        unguided = norm(hidden[[lane for lane, _ in guides], [column for _, column in guides]])
        samplings = [choice.row.sampling.of(self.slots[choice.slot].modality) for choice in choices]
        noise = [s.temperature * gaussian(s.seed, choice.place, width) for s, choice in zip(samplings, choices, strict=True)]
        scale = torch.tensor([choice.weight for choice in choices], device=self.device, dtype=states.dtype)
        vectors, embedded = self.model.write(states, torch.stack(noise).to(states), unguided, scale)
        for choice, vector, read in zip(choices, vectors, embedded.split(1), strict=True):
            choice.row.take_vector(vector, read)

    def _write_blocks(self, rows: list[Row], cache: KVCache, stop: Collection[int]) -> None:
        """Draws all vectors of the spans that rows have just entered, each span at once, in as many passes as the flow has steps.

        The passes keep nothing in the cache: what stays are the finished vectors, which the next round reads.
        """
        firsts = {lane.index: len(lane.tokens) - 1 for row in rows for lane in row.lanes}
        for row in rows:
            before = len(row.tokens)
            while not row.done and self.slots[row.state.slot].forced == Special.FEATURE:
                row.push(Special.FEATURE, stop)
            row.forget_drafts()
            row.stats.per_pass += [0] * (self.model.flow.config.steps - 1) + [len(row.tokens) - before]
        rows = [row for row in rows if self.slots[row.state.slot].forced != Special.FEATURE]  # others ended inside
        if not rows:
            return
        sizes = {row.index: len(row.tokens) - firsts[row.index] for row in rows}
        width, dim = max(sizes.values()), self.model.config.feature_width
        noise = torch.zeros(len(rows), width, dim)
        weights = torch.ones(len(rows), width, 1)
        for i, row in enumerate(rows):
            places, settings = range(firsts[row.index], len(row.tokens)), row.sampling.of(self.slots[row.slots[-1]].modality)
            noise[i, : len(places)] = settings.temperature * torch.stack([gaussian(settings.seed, p, dim) for p in places])
            weights[i, : len(places), 0] = torch.tensor([settings.weight(p) for p in torch.linspace(0, 1, len(places)).tolist()])
        weights = weights.to(self.device, self.dtype)
        positions = self.tensor([[(0, 0, 0)] * width] * len(cache.lengths))
        for row in rows:
            for lane in row.lanes:
                positions[lane.index, : sizes[row.index]] = self.tensor(lane.positions[firsts[lane.index] :])
        slots = [[rows[0].slots[-1]] * width] * len(cache.lengths)  # all are of one medium

        def velocity(points: Tensor, time: float) -> Tensor:
            mask = cache.begin(width)
            embedded = torch.zeros(len(cache.lengths), width, self.model.config.backbone.width, device=self.device, dtype=self.dtype)
            for row, own in zip(rows, points, strict=True):
                size = sizes[row.index]
                for lane in row.lanes:
                    first = firsts[lane.index]
                    mask[lane.index, :, :size, first : first + size] = True
                    embedded[lane.index, :size] = self.model.embed_points(own[:size], time)
            states = self.model.backbone.norm(self.model.extend(embedded, positions, mask, cache.layers, slots))
            found = self.model.flow(states)
            moves = [
                found[row.index] if row.branch is None else torch.lerp(found[row.branch.index], found[row.index], weight)
                for row, weight in zip(rows, weights, strict=True)
            ]
            return torch.stack(moves)

        vectors = self.model.flow.euler(noise.to(self.device, self.dtype), velocity)
        for row, own in zip(rows, vectors, strict=True):
            size = sizes[row.index]
            row.written.extend(own[:size])
            embedded = self.model.embed_points(self.model.flow.to_noise_units(own[:size]), 1.0)
            for lane in row.lanes:
                first = firsts[lane.index]
                lane.vectors[first] = embedded
                lane.inputs.append((first, first + size))

    def embed(self, tokens: Int[Tensor, "b s"], lanes: list[Lane], firsts: Sequence[int]) -> Float[Tensor, "b s d"]:
        """Embeddings of a window of every lane, with vectors where they stand in place of tokens.

        Args:
            tokens: of the windows.
            lanes: whose.
            firsts: offset at which each lane's window begins.
        """
        embedded = self.model.embed(tokens)
        for lane in lanes:
            begin = firsts[lane.index]
            for first, run in reversed(lane.vectors.items()):
                skip, at = max(0, begin - first), max(0, first - begin)
                if skip >= len(run):
                    break  # what stands before the window, and all before it
                inside = run[skip : skip + max(0, tokens.shape[1] - at)]
                embedded[lane.index, at : at + len(inside)] = inside.to(embedded.dtype)
        return embedded

    def _inputs_seen(self, lanes: list[Lane], firsts: Sequence[int], mask: Bool[Tensor, "b 1 s t"]) -> Bool[Tensor, "b 1 s t"] | None:
        """Which vectors each position may read by cross-attention: those of the span that ended last; None where no lane has any."""
        if not any(lane.inputs for lane in lanes):
            return None
        seen = torch.zeros_like(mask)
        for lane in lanes:
            for first, end in lane.inputs:
                behind = max(0, end - firsts[lane.index])
                seen[lane.index, :, behind:] = False
                seen[lane.index, :, behind:, first:end] = True
        return seen

    def tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self.device)
