"""Drafts of text by counts of n-grams that come with the model: which token followed the last few in the texts it was made for.

A table look-up per draft and no pass of any network, so that a draft needs to stand far less often to pay than one of a head. Unlike
:mod:`mmtp.decode.lookup`, which copies what stood in the stream itself, it knows the texts of a domain before the first of them is
written. Drafts are drawn of the counts' distribution, with the noise of their places, and so stand at temperatures above 0 as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.decode.chooser import Chooser
from mmtp.decode.drafts import Drafter, KeepsNothing
from mmtp.decode.rows import DecodeError, Lane, Row
from mmtp.decode.sample import Draft, propose, warp
from mmtp.decode.step import Step
from mmtp.types import Modality


@dataclass(frozen=True, kw_only=True)
class NGramDrafts:
    """Drafts by the n-grams of the model.

    Attributes:
        max_drafts: tokens to propose at most.
        least_chance: with which a draft and all before it have to stand by the counts. Making and verifying one takes some 0.05 passes, and
            a pass yields about two tokens, so that one of less than 0.1 costs more than it is to bring.
    """

    max_drafts: int = 12
    least_chance: float = 0.1

    def __post_init__(self) -> None:
        if self.max_drafts < 1:
            raise ValueError(f"max_drafts {self.max_drafts}: at least 1 is wanted")
        if not 0 <= self.least_chance <= 1:
            raise ValueError(f"least_chance {self.least_chance}: a number from 0 to 1 is wanted")

    def length(self, model: Step) -> int:
        """As of any :class:`mmtp.decode.drafts.Drafts`.

        Raises:
            DecodeError: the model has no counts.
        """
        if model.ngrams is None:
            raise DecodeError("drafts by n-grams: the model has none; count those of its texts with mmtp ngrams")
        return self.max_drafts

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> Drafter:
        return _NGramDrafter(chooser, self)


class _NGramDrafter(KeepsNothing):
    """Keeps nothing: what comes before is read off the stream."""

    def __init__(self, chooser: Chooser, source: NGramDrafts) -> None:
        self.chooser, self.ngrams = chooser, chooser.model.ngrams
        self.max_drafts, self.least_chance = source.max_drafts, source.least_chance
        self._sizes = [sum(hi - lo for lo, hi in slot.generable) for slot in chooser.slots]
        self._text = [slot.modality is Modality.TEXT for slot in chooser.slots]
        # Local ids of the slots of text, by vocabulary id; -1 of what they do not allow.
        self._local = {i: self._local_ids(i) for i, text in enumerate(self._text) if text}

    def _local_ids(self, slot: int) -> Int[np.ndarray, " v"]:
        local = np.full(self.chooser.model.config.layout.size, -1)
        allowed = np.concatenate([np.arange(0), *(np.arange(lo, hi) for lo, hi in self.chooser.slots[slot].generable)])
        local[allowed] = np.arange(len(allowed))
        return local

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        for row in rows:
            if not row.done:
                self._draft(row)

    def _draft(self, row: Row) -> None:
        """Drafts on until no text may follow, none is known that could, or one more would not pay."""
        context, chance, making = self._text_before(row), 1.0, row.alone(self.chooser.costs.draft_by_counts)
        while len(row.drafts) < self.max_drafts and self._text[row.draft_states[-1].slot] and row.wants(making):
            local, likely = self._likely(row, context)
            # Of the draft that is to be drawn only the distribution is asked: rejection forbids to drop one for what it is.
            if not len(local) or chance * likely.max() < self.least_chance:
                return
            slot, place = row.draft_states[-1].slot, len(row.tokens) + len(row.drafts)
            draft = self._draw(row, slot, place, local, likely)
            chance *= float(likely[local == draft.token].sum())
            draft = draft._replace(token=self.chooser.logits.token(slot, draft.token))
            row.take_draft(draft, len(row.drafts) + 1, making)
            context.append(draft.token)

    def _draw(self, row: Row, slot: int, place: int, local: Int[np.ndarray, " n"], likely: Float[np.ndarray, " n"]) -> Draft:
        """A draft by the probabilities of some local ids of a slot."""
        sampling, logits = row.sampling.of(Modality.TEXT), torch.from_numpy(np.log(likely).astype(np.float32))[None]
        if not sampling.rejects:  # all others have probability 0, and need not be looked at
            scores = warp(logits, sampling)
            if sampling.temperature:
                scores = scores + row.noise.at(place, self._sizes[slot])[torch.from_numpy(local)]
            return Draft(int(local[scores.numpy().argmax()]))
        whole = torch.full((1, self._sizes[slot]), float("-inf"))
        whole[0, torch.from_numpy(local)] = logits
        (draft,) = propose(whole.to(self.chooser.device), sampling, row.noise, [place], len(row.tokens))
        return draft

    def _text_before(self, row: Row) -> list[int]:
        """The last text of the stream, drafts included, as much as counts."""
        tokens = chain(reversed(row.drafts), reversed(row.tokens))
        slots = chain((state.slot for state in row.draft_states[-2::-1]), reversed(row.slots))
        text = (token for token, slot in zip(tokens, slots, strict=True) if self._text[slot])
        return list(islice(text, self.ngrams.order - 1))[::-1]

    def _likely(self, row: Row, context: Sequence[int]) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """What is known that may be drafted next: local ids of its slot, and probabilities."""
        answer, withheld = row.answer(-1), row.withheld
        tokens, likely = self.ngrams.predict(context)
        local = self._local[row.draft_states[-1].slot][tokens]
        kept = local >= 0
        if withheld or answer is not None:
            may = [token not in withheld and (answer is None or answer.allows(token)) for token in tokens.tolist()]
            kept &= np.array(may, dtype=bool)
        return (local, likely) if kept.all() else (local[kept], likely[kept] / likely[kept].sum())
