"""Key-value cache in one block of memory: rows of different lengths, rollback by moving a pointer.

A token's slot in the cache is its place in the stream. A pass writes ``s`` slots from each row's length on; what lies beyond a
row's length is garbage that no query sees, because a query sees only slots up to its own. So accepting fewer tokens than were
written, or padding a pass to a fixed width, needs no clean-up.

Where a position attends to a window of the stream alone, what has fallen out of all windows is dropped: in whole blocks, when a pass would
need more room, and what stays moves to the front. So a lane needs the room of a window, a pass and two blocks however long it gets, sums
over keys are over the same blocks as if all were there, and rollback stays a pointer.

A row of the cache is a lane. Passes are of some consecutive lanes, on which the cache is focused; the others keep what they hold, and
what they hold can be copied.

Keys and values may be held in fewer bits than a pass computes with: in bfloat16, or in int8 with a float32 scale for every token and key
head, which stands in the four bytes behind its numbers. What is held of a token depends on the token's own keys and values alone, so plain
and speculative decoding read the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from mmtp.nn.graphs import WIDTHS, Graphs, padded_width
from mmtp.nn.native import Held
from mmtp.nn.ragged import Ragged
from mmtp.types import MmtpError

# Attention runs over whole blocks of slots, so that few shapes occur.
BLOCK = 64
# Kernels on CPUs sum over so many keys at a time. Over whole blocks of them the sum at a place is the same bits in every pass.
EXACT_BLOCK = 512
FIRST_CAPACITY = 256
SCALE_BYTES = 4


class CacheFullError(MmtpError):
    """A row has reached the end of its context."""


class KVCache:
    """Keys and values of all layers.

    Args:
        num_layers: layers.
        batch_size: rows.
        num_kv_heads: key heads.
        head_dim: width of one head.
        capacity: greatest number of tokens per row; room is made as it is needed.
        device: where it lives.
        dtype: of keys and values in passes.
        block: passes attend to whole blocks of so many slots.
        stored: in which keys and values are kept: ``torch.bfloat16`` or ``torch.int8``; None keeps them as they are.
        compiled: whether passes are those of :mod:`mmtp.nn.native`.
        recorded: whether they are those of :mod:`mmtp.nn.graphs`, for which all room is made at once, or what a window needs, and stays
            where it is.
        window: how many tokens a position attends to at most, itself included; 0 for all.
        spare: by how many tokens a lane may be shortened between passes and still have its window.

    Attributes:
        lengths: tokens in the lanes in focus.
        starts: where among what is held of them the pass writes: behind their tokens, less those that were dropped.
        ragged: which places of the pass hold tokens, where padding is left out; else None.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        block: int = BLOCK,
        stored: torch.dtype | None = None,
        compiled: bool = False,
        window: int = 0,
        spare: int = 0,
        recorded: bool = False,
    ) -> None:
        self.dtype, self.compiled = dtype, compiled
        self.graphs = Graphs() if recorded else None
        self.programs: dict[Any, Any] = {}
        if stored == torch.int8:
            head_dim += SCALE_BYTES
        self.limit, self.block, self.window, self.spare = capacity, block, window, spare
        most = capacity + WIDTHS[-1] if recorded else capacity  # a pass may be padded beyond the last token
        most = -(-most // block) * block
        first = max(block, FIRST_CAPACITY)
        if recorded:
            first = self._for_window(WIDTHS[-1]) if window else most
        self.capacity = min(most, first)
        shape = (num_layers, 2, batch_size, num_kv_heads, self.capacity, head_dim)
        self.storage = torch.zeros(shape, device=device, dtype=stored or dtype)
        self.lengths = [0] * batch_size
        self.starts = [0] * batch_size
        self.first = 0
        self._held = [0] * batch_size  # lengths of all lanes; those in focus are written back when the focus moves
        self._oldest = [0] * batch_size
        self.layers = [_Layer(self, i) for i in range(num_layers)]
        self._places = torch.arange(most, device=device)
        self._lanes = torch.arange(batch_size, device=device).unsqueeze(1)
        self._fresh = self._lanes, self._lanes
        self.extent = 0
        self.ragged: Ragged | None = None
        self._width = 0
        self._views: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None

    def begin(self, width: int, widths: Sequence[int] | None = None) -> Bool[Tensor, "b 1 s t"]:
        """Readies a pass of ``width`` tokens per row and returns its mask.

        Args:
            width: tokens of a row at most.
            widths: how many each row has, where padding behind them is to be left out; None computes it too.

        Raises:
            CacheFullError: a row has no room for ``width`` more tokens.
        """
        longest = max(self.lengths)
        if longest + width > self.limit:
            raise CacheFullError(f"context of {self.limit} tokens is full: {longest} are in it and {width} more do not fit")
        computed = width if self.graphs is None else padded_width(width)
        if self.window:
            self._drop(computed)
        self.starts = [length - self._oldest[self.first + i] for i, length in enumerate(self.lengths)]
        self.extent = self._extent(max(self.starts) + computed)
        self._width, self._views = width, None
        self.ragged = None if widths is None else Ragged.of(widths, width, self.storage.device)
        if self.extent > self.capacity:
            self._grow()
        seen = self._places[: self.extent]
        if self.graphs is not None:
            slots = torch.tensor(self.starts, device=self.storage.device).unsqueeze(1) + self._places[:computed]
            self.graphs.begin(self.first, slots)
            return self._sees(slots[:, :width].unsqueeze(2), seen).unsqueeze(1)
        if len(self.lengths) == 1:
            own = self._places[self.starts[0] : self.starts[0] + width].unsqueeze(1)
            return self._sees(own, seen)[None, None]
        slots = torch.tensor(self.starts, device=self.storage.device).unsqueeze(1) + self._places[:width]
        self._fresh = self._lanes[: len(slots)], slots
        if self.ragged is not None:
            self._fresh = self.ragged.at // width, slots.flatten()[self.ragged.at]
        return self._sees(slots.unsqueeze(2), seen).unsqueeze(1)

    def _extent(self, needed: int) -> int:
        """Slots that a pass attends to, so many at least, in whole blocks; where passes are recorded, powers of two."""
        if self.graphs is None:
            return -(-needed // self.block) * self.block
        rounded = max(self.block, FIRST_CAPACITY, 1 << (needed - 1).bit_length())
        return min(rounded, max(self.capacity, -(-needed // self.block) * self.block))

    def _for_window(self, width: int) -> int:
        """Slots that a window needs, with passes of so many tokens."""
        return (-(-(self.window + self.spare + width) // self.block) + 1) * self.block

    def _sees(self, own: Int[Tensor, "*b s 1"], places: Int[Tensor, " t"]) -> Bool[Tensor, "*b s t"]:
        """Whether a position sees a place."""
        return places <= own if not self.window else (places <= own) & (places > own - self.window)

    def _drop(self, width: int) -> None:
        """Makes room in lanes that a pass of so many tokens would not fit into."""
        for lane, length in enumerate(self.lengths, self.first):
            if not length:
                self._oldest[lane] = 0
            end = length - self._oldest[lane]
            gone = (end + 1 - self.window - self.spare) // self.block * self.block
            if gone > 0 and end + width > self.capacity:
                self.storage[:, :, lane, :, : end - gone] = self.storage[:, :, lane, :, gone:end].clone()
                self._oldest[lane] += gone

    def views(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What the pass attends to, keys and values of every layer, and where one of a single lane writes them; else nothing.

        All layers are sliced at once: each by itself would cost as much as a small product. Compiled passes ask for none.
        """
        if self._views is None:
            lanes = self.storage.narrow(2, self.first, len(self.lengths))
            seen = lanes.narrow(4, 0, self.extent).flatten(0, 1).unbind(0)
            alone = len(self.lengths) == 1 and self.graphs is None
            self._views = seen, lanes.narrow(4, self.starts[0], self._width).flatten(0, 1).unbind(0) if alone else ()
        return self._views

    def _grow(self) -> None:
        """Twice the room, so that copying costs a constant per token in the long run; no more than a window needs. What was recorded over
        the old one is gone.
        """
        if self.graphs is not None:
            self.graphs = Graphs()
        needed = len(self._places)
        if self.window:
            needed = max(self.extent, self._for_window(self._width))
        self.capacity = min(max(self.extent, 2 * self.capacity), needed, len(self._places))
        grown = self.storage.new_zeros((*self.storage.shape[:4], self.capacity, self.storage.shape[5]))
        grown[..., : self.storage.shape[4], :] = self.storage
        self.storage = grown

    def commit(self, counts: Sequence[int]) -> None:
        """Keeps the first ``counts[row]`` tokens of the pass; the others are as if never written."""
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]

    def focus(self, first: int, count: int) -> None:
        """Turns to ``count`` lanes from ``first`` on: passes are of these alone."""
        self._settle()
        self.first, self.lengths = first, self._held[first : first + count]

    def held(self, lane: int) -> int:
        """Tokens that any lane holds."""
        self._settle()
        return self._held[lane]

    def oldest(self, lane: int) -> int:
        """Offset of the first token that any lane still holds."""
        return self._oldest[lane]

    def keeps(self, lane: int, length: int) -> bool:
        """Whether a lane still holds all that tokens behind its first ``length`` ones attend to."""
        oldest = self._oldest[lane]
        return not oldest or oldest <= length + 1 - self.window

    def copy(self, source: int, target: int, length: int) -> None:
        """Puts the first ``length`` tokens of a lane, as far as it :meth:`keeps` them, into another, in place of what that held; lanes are
        counted from the first of all.
        """
        self._settle()
        oldest = self._oldest[source] if length else 0
        if length and source != target:
            self.storage[:, :, target, :, : length - oldest] = self.storage[:, :, source, :, : length - oldest]
        self._held[target], self._oldest[target] = length, oldest
        self.lengths = self._held[self.first : self.first + len(self.lengths)]

    def swap(self, one: int, other: int) -> None:
        """Exchanges what two lanes hold."""
        self._settle()
        length = max(self._held[lane] - self._oldest[lane] for lane in (one, other))
        self.storage[:, :, [one, other], :, :length] = self.storage[:, :, [other, one], :, :length]
        for kept in (self._held, self._oldest):
            kept[one], kept[other] = kept[other], kept[one]
        self.lengths = self._held[self.first : self.first + len(self.lengths)]

    def _settle(self) -> None:
        self._held[self.first : self.first + len(self.lengths)] = self.lengths


class _Layer:
    """One layer's share of the cache, as :class:`mmtp.nn.attention.Attention` sees it."""

    __slots__ = ("cache", "index")

    def __init__(self, cache: KVCache, index: int) -> None:
        self.cache, self.index = cache, index

    @property
    def held(self) -> Held | None:
        cache = self.cache
        return Held(cache.storage, self.index, cache.first, cache.starts, cache.ragged, cache.programs) if cache.compiled else None

    @property
    def graphs(self) -> Graphs | None:
        return self.cache.graphs

    @property
    def ragged(self) -> Ragged | None:
        return self.cache.ragged

    def update(
        self, keys: Float[Tensor, "b k s hd"], values: Float[Tensor, "b k s hd"]
    ) -> tuple[Float[Tensor, "lanes k t hd"], Float[Tensor, "lanes k t hd"]]:
        cache, i = self.cache, 2 * self.index
        if cache.storage.dtype != cache.dtype:
            keys, values = (_packed(x) if cache.storage.dtype == torch.int8 else x.to(cache.storage.dtype) for x in (keys, values))
        seen, fresh = cache.views()
        if fresh:
            fresh[i].copy_(keys)
            fresh[i + 1].copy_(values)
        else:
            lanes, slots = cache._fresh if cache.graphs is None else (cache._lanes[: len(keys)], cache.graphs.slots)
            for held, x in ((seen[i], keys), (seen[i + 1], values)):
                held[lanes, :, slots] = x.transpose(1, 2) if cache.ragged is None else x[0].transpose(0, 1)
        return self.read()

    def read(self) -> tuple[Float[Tensor, "lanes k t hd"], Float[Tensor, "lanes k t hd"]]:
        cache, i = self.cache, 2 * self.index
        seen, _ = cache.views()
        keys, values = seen[i], seen[i + 1]
        if cache.storage.dtype == cache.dtype:
            return keys, values
        if cache.storage.dtype == torch.int8:
            return _unpacked(keys, cache.dtype), _unpacked(values, cache.dtype)
        return keys.to(cache.dtype), values.to(cache.dtype)


def _packed(x: Float[Tensor, "b k s hd"]) -> Int8[Tensor, "b k s hd+4"]:
    """Numbers of every token and head in 8 bits, and their scale behind them."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_(min=1e-12) / 127
    return torch.cat(((x / scale).round_().to(torch.int8), scale.view(torch.int8)), dim=-1)


def _unpacked(held: Int8[Tensor, "b k t packed"], dtype: torch.dtype) -> Float[Tensor, "b k t packed-4"]:
    return held[..., :-SCALE_BYTES].to(dtype) * held[..., -SCALE_BYTES:].view(torch.float32).to(dtype)
