"""A model as decoding uses it: reads windows of lanes, and chooses among the ids that grammar, constraint and settings leave."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmtp.decode.cache import BLOCK, EXACT_BLOCK, KVCache
from mmtp.decode.costs import BY_CALLS, COMPILED, ON_ACCELERATORS
from mmtp.decode.rows import Choice, DecodeError, Lane, Row
from mmtp.decode.sample import Draft, choose, penalize, propose
from mmtp.decode.step import SlotLogits, Step
from mmtp.nn.linear import pack_linears
from mmtp.nn.native import library, usable
from mmtp.nn.picking import Choosing, Pick, pick
from mmtp.stream.grammar import StreamGrammar

MIN_EXACT_WIDTH = 4
"""From four rows on, matrix kernels give each row the same result whatever the number of rows; attention's, which take many queries in
parts, where the last part has as many."""


def exact_width(width: int) -> int:
    """The least width from ``width`` on at which every kernel gives each row the same result."""
    return -(-width // MIN_EXACT_WIDTH) * MIN_EXACT_WIDTH


def _records(device: torch.device) -> bool:
    """Whether compiled passes on a device are recorded ones."""
    return device.type != "cpu"


CACHES = {None: None, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""What :class:`KVCache` may hold keys and values in; None: as they are computed."""


class Chooser:
    """Chooses tokens with a model.

    Args:
        model: in evaluation mode.
        cache: what caches hold keys and values in, by its name in ``CACHES``.
        compiled: whether passes are compiled: on CPUs to those of :mod:`mmtp.nn.native`, on accelerators to :mod:`mmtp.nn.graphs`. None
            compiles them on a CPU that can, where nothing is asked that compiled passes have not.

    Raises:
        DecodeError: there is no such cache, or passes of this model cannot be compiled.
        NativeError: this machine cannot compile them.
    """

    def __init__(self, model: Step, cache: str | None = None, compiled: bool | None = False) -> None:
        if cache not in CACHES:
            raise DecodeError(f"cache {cache!r}: one of {', '.join(str(name) for name in CACHES)} is wanted")
        device = model.unembedding.weight.device
        if compiled is None:
            compiled = device.type == "cpu" and cache is None and not model.backbone.uncompiled and usable()
        recorded = compiled and _records(device)
        if compiled:
            if lacking := model.backbone.uncompiled:
                raise DecodeError(f"compile: passes of a model with {lacking} are not compiled; leave it out")
            if model.flow is not None and not recorded and model.unembedding.weight.dtype != torch.float32:
                raise DecodeError("compile: a model that writes vectors is compiled in float32; leave it out, or load the model so")
            if cache is not None and not recorded:
                raise DecodeError(f"compile: compiled passes hold keys and values in full, not in {cache}; leave one of the two out")
            if not recorded:
                library()
        self.model, self.cache = model, CACHES[cache]
        self.compiled, self.recorded = compiled and not recorded, recorded
        way = COMPILED if self.compiled else BY_CALLS if device.type == "cpu" else ON_ACCELERATORS
        self.costs = way.costs(model)
        self.grammar = StreamGrammar(model.config.layout)
        self.logits = SlotLogits(model.config.layout, model.unembedding.weight, self.compiled)
        self.slots = model.config.layout.slots
        if isinstance(model, torch.nn.Module):
            pack_linears(model)
        self.device = device
        self.dtype = torch.float32 if self.compiled else model.unembedding.weight.dtype  # of states

    def new_cache(self, layers: int, lanes: int, capacity: int, exact: bool = False, spare: int = 0, backbone: bool = True) -> KVCache:
        """A cache for so many layers with keys and values of the backbone's shape and window.

        Args:
            layers: of it.
            lanes: of it.
            capacity: tokens per lane at most.
            exact: whether sums are to be the same bits in every pass.
            spare: by how many tokens a lane may be shortened between passes.
            backbone: whether passes are the backbone's, which alone are recorded, and not a head's.
        """
        sizes, block = self.model.config.backbone, EXACT_BLOCK if exact else BLOCK
        shape = (layers, lanes, sizes.num_kv_heads, sizes.head_dim, capacity)
        recorded = self.recorded and backbone
        return KVCache(*shape, self.device, self.dtype, block, self.cache, self.compiled, sizes.window, spare, recorded)

    def leaves_out_padding(self, exact: bool) -> bool:
        """Whether passes compute nothing for the padding behind lanes.

        Args:
            exact: whether states are to be the same bits in every pass, for which those of torch have to be as wide.
        """
        backbone = self.model.backbone
        return self.compiled or not (exact or self.recorded or backbone.num_experts or backbone.cross)

    def widths(self, windows: Sequence[Sequence[int]], exact: bool) -> list[int] | None:
        """Tokens of the lanes of a pass, where the padding behind them is left out."""
        return [len(window) for window in windows] if self.leaves_out_padding(exact) else None

    def pick(self, hidden: Float[Tensor, "b s d"], wanted: list[Choice], exact: bool = False) -> list[Draft]:
        """Chooses a token at every wanted place.

        Args:
            hidden: states of the pass.
            wanted: where.
            exact: take at least as many rows at a time as make the kernels agree.

        Returns:
            Tokens, and where rejection judges what they were drawn of.
        """
        chosen = [Draft(self._forced(choice) or 0) for choice in wanted]
        at_once: dict[int, list[tuple[int, Choosing]]] = defaultdict(list)
        apart = []
        for i in self._unforced(wanted):
            if (how := self._how(wanted[i])) is not None:
                at_once[wanted[i].slot].append((i, how))
            else:
                apart.append(i)
        for slot, members in at_once.items():
            for (i, _), token in zip(members, self._at_once(hidden, wanted, slot, members), strict=True):
                chosen[i] = Draft(self.logits.token(slot, token))
        for row, slot, own, scores in self.scores(self.model.backbone.norm, hidden, wanted, exact, apart):
            settings, places = row.sampling.of(self.slots[slot].modality), [wanted[i].place for i in own]
            drafts = [self._local(slot, wanted[i].draft) for i in own]
            begun = len(row.tokens) if row.proposals else None
            for i, choice in zip(own, choose(scores, settings, row.noise, places, drafts, begun), strict=True):
                chosen[i] = choice._replace(token=self.logits.token(slot, choice.token))
        return chosen

    def propose(self, norm: Any, hidden: Float[Tensor, "b s d"], wanted: list[Choice], exact: bool = False) -> list[Draft]:
        """Drafts a token at every wanted place. Rejection keeps what a place holds for a ``draft``, the last pass's choice, where it can.

        Args:
            norm: applied to the states first.
            hidden: states.
            wanted: where.
            exact: see :meth:`pick`.
        """
        proposed = [Draft(self._forced(choice) or 0) for choice in wanted]
        for row, slot, own, scores in self.scores(norm, hidden, wanted, exact):
            withheld = [self.logits.local(slot, token) for token in row.withheld if self.slots[slot].generates(token)]
            settings, places = row.sampling.of(self.slots[slot].modality), [wanted[i].place for i in own]
            left = [self._local(slot, wanted[i].draft) for i in own]
            for i, draft in zip(own, propose(scores, settings, row.noise, places, len(row.tokens), withheld, left), strict=True):
                proposed[i] = draft._replace(token=self.logits.token(slot, draft.token))
        return proposed

    def _local(self, slot: int, draft: Draft | None) -> Draft | None:
        """A draft by its id among the legal ones of a slot."""
        return None if draft is None else draft._replace(token=self.logits.local(slot, draft.token))

    def _forced(self, choice: Choice) -> int | None:
        """The one id that grammar and constraint leave at a place, if they leave only one."""
        return self.slots[choice.slot].forced if choice.answer is None else choice.answer.forced

    def _unforced(self, wanted: list[Choice]) -> list[int]:
        """Indices of the places with more than one legal id."""
        return [i for i, choice in enumerate(wanted) if self._forced(choice) is None]

    def _how(self, choice: Choice) -> Choosing | None:
        """How a token is chosen by one kernel, from the state on; None where it is by calls of torch. Which of both hangs on the request
        and the place alone, for they round otherwise.
        """
        row = choice.row
        penalized = row.sampling.repetition_penalty != 1 and self.logits.text(choice.slot).stop
        if not self.compiled or row.rejects or choice.answer is not None or penalized:
            return None
        return row.sampling.of(self.slots[choice.slot].modality).choosing

    def _at_once(self, hidden: Float[Tensor, "b s d"], wanted: list[Choice], slot: int, members: list[tuple[int, Choosing]]) -> list[int]:
        """Tokens of one slot, by their ids among its legal ones."""
        weights, outputs, rounded = self.logits.laid_out(slot)
        picks, length = [], hidden.shape[1]
        for i, how in members:
            row, column, _, place, guide, weight, *_ = wanted[i]
            noise = row.noise.at(place, outputs) if row.sampling.of(self.slots[slot].modality).temperature else None
            picks.append(Pick(row.index * length + column, how, noise, None if guide is None else guide[0] * length + guide[1], weight))
        norm = self.model.backbone.norm
        return pick(hidden.flatten(0, 1), norm.weight.float(), norm.eps, weights, outputs, picks, rounded)

    def scores(
        self, norm: Any, hidden: Float[Tensor, "b s d"], wanted: list[Choice], exact: bool, among: Iterable[int] | None = None
    ) -> Iterator[tuple[Row, int, list[int], Float[Tensor, "m n"]]]:
        """Logits at the wanted places, after guidance and penalty, over each slot's legal ids alone.

        Args:
            norm: see :meth:`propose`.
            hidden: likewise.
            wanted: likewise.
            exact: likewise.
            among: indices of the places that are meant; None for all that have more than one legal id.

        Yields:
            A row, a slot, indices of the row's places of that slot, and their logits.
        """
        by_slot: dict[int, list[int]] = defaultdict(list)
        for i in self._unforced(wanted) if among is None else among:
            by_slot[wanted[i].slot].append(i)
        for slot, members in by_slot.items():
            at = [(wanted[i].row.index, wanted[i].column) for i in members]
            (lane, first), last = at[0], at[-1][1]
            guided = [n for n, i in enumerate(members) if wanted[i].guide is not None]
            at += [guide for i in members if (guide := wanted[i].guide) is not None]
            if at == [(lane, column) for column in range(first, last + 1)]:
                states = norm(hidden[lane, first : last + 1])  # a view: looking rows up costs more
            else:
                states = norm(hidden[[lane for lane, _ in at], [column for _, column in at]])
            if exact and len(at) < MIN_EXACT_WIDTH:
                states = torch.nn.functional.pad(states, (0, 0, 0, MIN_EXACT_WIDTH - len(at)))
            logits = self.logits(states, slot)
            if guided:
                scale = torch.tensor([[wanted[members[n]].weight] for n in guided], device=logits.device, dtype=logits.dtype)
                logits[guided] = torch.lerp(logits[len(members) : len(at)], logits[guided], scale)
            for n, i in enumerate(members):
                if (answer := wanted[i].answer) is not None:
                    logits[n, ~self.logits.among(slot, answer.legal).to(logits.device)] = float("-inf")
            done = 0
            for row, group in groupby(members, key=lambda i: wanted[i].row):
                own = list(group)
                scores = logits[done : done + len(own)]
                done += len(own)
                if row.sampling.repetition_penalty != 1 and (text := self.logits.text(slot)).stop:
                    seen = row.seen([wanted[i].place for i in own]).to(scores.device)
                    scores[:, text] = penalize(scores[:, text], seen, row.sampling.repetition_penalty)
                yield row, slot, own, scores

    def embed(self, tokens: Int[Tensor, "b s"], lanes: list[Lane], firsts: Sequence[int]) -> Float[Tensor, "b s d"]:
        """Embeddings of a window of every lane, with vectors where they stand in place of tokens.

        Args:
            tokens: of the windows.
            lanes: whose.
            firsts: offset at which each lane's window begins.
        """
        embedded = self.model.embed(tokens).to(self.dtype)
        for lane in lanes:
            begin = firsts[lane.index]
            for first, run in reversed(lane.vectors.items()):
                skip, at = max(0, begin - first), max(0, first - begin)
                if skip >= len(run):
                    break  # what stands before the window, and all before it
                inside = run[skip : skip + max(0, tokens.shape[1] - at)]
                embedded[lane.index, at : at + len(inside)] = inside.to(embedded.dtype)
        return embedded

    def inputs_seen(self, lanes: list[Lane], firsts: Sequence[int], mask: Bool[Tensor, "b 1 s t"]) -> Bool[Tensor, "b 1 s t"] | None:
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
        """On the model's device."""
        return torch.tensor(values, device=self.device)
