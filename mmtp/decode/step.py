"""What decoding needs of a model, and what it knows of a vocabulary: ids, slots, logits over the legal ids."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmtp.nn import native
from mmtp.nn.attention import LayerCache
from mmtp.nn.linear import Derived, packed_linear
from mmtp.stream.vocab import VocabLayout


@runtime_checkable
class Step(Protocol):
    """A model as the engine sees it; :class:`mmtp.models.unified.UnifiedModel` is one."""

    if TYPE_CHECKING:
        # Modules in modules are found by __getattr__, which from Python 3.12 on isinstance does not ask.
        config: Any
        head: Any
        flow: Any
        next_scale: Any
        backbone: Any
        embedding: Any
        unembedding: Any
        ngrams: Any
        refiner: Any

    def embed(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]: ...

    def extend(
        self,
        embedded: Float[Tensor, "b s d"],
        positions: Int[Tensor, "b s 3"],
        mask: Tensor,
        caches: Sequence[LayerCache],
        slots: Sequence[Sequence[int]],
        seen: Bool[Tensor, "b 1 s t"] | None = None,
    ) -> Float[Tensor, "b s d"]: ...

    def write(
        self, states: Float[Tensor, "n d"], noise: Float[Tensor, "n c"], guides: Float[Tensor, "n d"], guidance: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n d"]]: ...

    def embed_points(self, points: Float[Tensor, "n c"], time: float) -> Float[Tensor, "n d"]: ...

    def ask(self, codes: Int[Tensor, " n"]) -> Float[Tensor, "m d"]: ...


class SlotLogits:
    """Logits over the ids that a slot allows to be written.

    Args:
        layout: the vocabulary.
        unembedding: one row per id.
        compiled: whether products are those of :mod:`mmtp.nn.native`.
    """

    def __init__(self, layout: VocabLayout, unembedding: Float[Tensor, "v d"], compiled: bool = False) -> None:
        self._compiled = compiled
        self._weights: list[Tensor] = []
        self._packed: list[Derived] = []
        self._pairs: list[Derived] = []
        packed, paired = (defaultdict[tuple[Any, ...], Derived](Derived) for _ in range(2))
        self._ids: list[list[int] | int] = []
        self._index: dict[int, Tensor] = {}
        self._all_ids: dict[int, Tensor] = {}
        self._text, self._slots = layout.text_range, layout.slots
        for slot in layout.slots:
            ranges = slot.generable
            # One range, as for all codes, is a view of the table: nothing is copied, and ids are a shift.
            self._weights.append(
                torch.cat([unembedding[lo:hi] for lo, hi in ranges]) if len(ranges) > 1 else unembedding[slice(*(ranges or ((0, 0),))[0])]
            )
            self._packed.append(packed[ranges])
            self._pairs.append(paired[ranges])
            self._ids.append(ranges[0][0] if len(ranges) == 1 else [i for lo, hi in ranges for i in range(lo, hi)])

    def __call__(self, states: Float[Tensor, "m d"], slot: int) -> Float[Tensor, "m n"]:
        weight = self._weights[slot]
        if self._compiled:
            return native.linear(states, *self.laid_out(slot))
        return packed_linear(states, weight, self._packed[slot])

    def pairs(self, slot: int) -> tuple[Float[Tensor, "p d2 n 2"], Int[Tensor, " ids"]]:
        """The weights of a slot as :class:`mmtp.nn.refinement.Refinement` reads them, and the ids."""
        weight, ids = self._weights[slot], self._ids[slot]
        if slot not in self._all_ids:
            self._all_ids[slot] = torch.arange(ids, ids + len(weight)) if isinstance(ids, int) else torch.tensor(ids)
        if self._compiled and (own := self.laid_out(slot)[0]).dtype == torch.bfloat16:
            return own, self._all_ids[slot]
        return self._pairs[slot].get((weight,), lambda: native.pairs(weight.detach())), self._all_ids[slot]

    def laid_out(self, slot: int) -> tuple[Tensor, int, bool]:
        """The weights of a slot as compiled passes multiply by them, how many ids they are of, and whether states are rounded before."""
        weight = self._weights[slot]
        return self._packed[slot].get((weight,), lambda: native.laid_out(weight.detach())), len(weight), weight.dtype == torch.bfloat16

    def among(self, slot: int, legal: Bool[Tensor, " ids"]) -> Bool[Tensor, " n"]:
        """Which of a text slot's ids are legal, of all vocabulary ids up to the last of text."""
        if slot not in self._index:
            self._index[slot] = torch.tensor(self._ids[slot])
        return legal[self._index[slot]]

    def token(self, slot: int, local: int) -> int:
        """Vocabulary id of a local one."""
        ids = self._ids[slot]
        return ids + local if isinstance(ids, int) else ids[local]

    def text(self, slot: int) -> slice:
        """Local ids of all text tokens; empty where the slot allows none."""
        lo, hi = self._text
        return slice(self.local(slot, lo), self.local(slot, hi - 1) + 1) if self._slots[slot].generates(lo) else slice(0)

    def local(self, slot: int, token: int) -> int:
        """Local id of a vocabulary one that the slot allows."""
        ids = self._ids[slot]
        return token - ids if isinstance(ids, int) else bisect_left(ids, token)
