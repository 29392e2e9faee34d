"""Drafts of text from the stream itself: what followed the last words when they stood there before.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding), over the prompt and what has been written. It costs
no pass of any network, and pays where answers repeat: quotations, code, lists.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mmtp.decode.chooser import Chooser
from mmtp.decode.drafts import Drafter
from mmtp.decode.rows import Lane, Row
from mmtp.decode.sample import Draft
from mmtp.decode.step import Step
from mmtp.stream.vocab import Slot
from mmtp.types import Modality


@dataclass(frozen=True, kw_only=True)
class LookupDrafts:
    """Drafts by n-gram look-up.

    Attributes:
        max_drafts: tokens to propose at most.
        max_ngram: length of the suffix that is looked for first; shorter ones follow.
        min_ngram: length of the shortest.
    """

    max_drafts: int = 8
    max_ngram: int = 3
    min_ngram: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram}, max_ngram {self.max_ngram}: 1 or more is wanted, and no more than max_ngram")
        if self.max_drafts < 1:
            raise ValueError(f"max_drafts {self.max_drafts}: at least 1 is wanted")

    def length(self, model: Step) -> int:
        return self.max_drafts

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> Drafter:
        return _LookupDrafter(self, chooser.slots, num_lanes)


class _Index:
    """What follows each n-gram of a stream, where it stood last.

    Attributes:
        after: n-gram -> the place behind it.
        end: places up to here are in it.
    """

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}
        self.end = 0


class _LookupDrafter:
    """An index of each row."""

    lookahead, pads = 0, False

    def __init__(self, source: LookupDrafts, slots: Sequence[Slot], num_lanes: int) -> None:
        self.source, self.slots = source, slots
        self._all = [_Index() for _ in range(num_lanes)]
        self._indices = self._all

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        for row in rows:
            if not row.done and (place := self._find(row)):
                self._copy(row, place)

    def restart(self, lane: int) -> None:
        """Branches draft what their rows do; nothing is kept of them."""

    def focus(self, first: int, count: int) -> None:
        self._indices = self._all[first : first + count]

    def held(self, lane: int) -> int:
        return sys.maxsize  # what is missing is read off the stream

    def keeps(self, lane: int, length: int) -> bool:
        return True

    def copy(self, source: int, target: int, length: int) -> None:
        self._all[target] = _Index()

    def swap(self, one: int, other: int) -> None:
        self._all[one], self._all[other] = self._all[other], self._all[one]

    def _find(self, row: Row) -> int:
        """The place after an earlier occurrence of the stream's end; 0 where there is none."""
        tokens, index, sizes = row.tokens, self._indices[row.index], range(self.source.max_ngram, self.source.min_ngram - 1, -1)
        for end in range(index.end + 1, len(tokens)):
            for n in sizes:
                if n <= end:
                    index.after[tuple(tokens[end - n : end])] = end
        index.end = max(index.end, len(tokens) - 1)
        return next((place for n in sizes if (place := index.after.get(tuple(tokens[-n:]), 0))), 0)

    def _copy(self, row: Row, place: int) -> None:
        for k in range(self.source.max_drafts):
            # What repeats with a short period is copied from its own drafts.
            token = (row.tokens[place + k :] or row.drafts[place + k - len(row.tokens) :])[0]
            slot = self.slots[row.draft_states[-1].slot]
            is_text = slot.modality is Modality.TEXT and slot.generates(token)
            if not (is_text and row.wants() and row.take_draft(Draft(token), k + 1)):
                return
