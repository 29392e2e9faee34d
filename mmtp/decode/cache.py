"""Preallocated key-value cache: rows of different lengths, rollback by moving a pointer.

A token's slot in the cache is its place in the stream. A pass writes ``s`` slots from each row's length on; what lies beyond a
row's length is garbage that no query sees, because a query sees only slots up to its own. So accepting fewer tokens than were
written, or padding a pass to a fixed width, needs no clean-up.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmtp.types import MmtpError

# Attention runs over whole blocks of slots, so that plain and speculative passes see equal shapes (and so equal rounding).
BLOCK = 64


class CacheFullError(MmtpError):
    """A row has reached the end of its context."""


class KVCache:
    """Keys and values of all layers.

    Args:
        num_layers: layers.
        batch_size: rows.
        num_kv_heads: key heads.
        head_dim: width of one head.
        capacity: slots per row; rounded up to whole blocks.
        device: where it lives.
        dtype: of keys and values.
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
    ) -> None:
        self.capacity = -(-capacity // BLOCK) * BLOCK
        shape = (num_layers, 2, batch_size, num_kv_heads, self.capacity, head_dim)
        self.storage = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size
        self.layers = [_Layer(self, self.storage[i, 0], self.storage[i, 1]) for i in range(num_layers)]
        self._causal = torch.ones(self.capacity, self.capacity, dtype=torch.bool, device=device).tril()
        self._rows = torch.arange(batch_size, device=device).unsqueeze(1)
        self.extent = 0
        self.start = 0
        self.slots: Tensor | None = None

    def begin(self, width: int) -> Bool[Tensor, "b 1 s t"]:
        """Readies a pass of ``width`` tokens per row and returns its mask.

        Raises:
            CacheFullError: a row has no room for ``width`` more tokens.
        """
        longest = max(self.lengths)
        if longest + width > self.capacity:
            raise CacheFullError(f"context of {self.capacity} tokens is full: {longest} are in it and {width} more do not fit")
        self.extent = -(-(longest + width) // BLOCK) * BLOCK
        self.start = self.lengths[0]
        if len(self.lengths) == 1:
            self.slots = None
            return self._causal[None, None, self.start : self.start + width, : self.extent]
        steps = torch.arange(width, device=self.storage.device)
        self.slots = torch.tensor(self.lengths, device=self.storage.device).unsqueeze(1) + steps
        return self._causal[self.slots, : self.extent].unsqueeze(1)

    def commit(self, counts: Sequence[int]) -> None:
        """Keeps the first ``counts[row]`` tokens of the pass; the others are as if never written."""
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]


class _Layer:
    """One layer's share of the cache, as :class:`mmtp.nn.attention.Attention` sees it."""

    __slots__ = ("cache", "keys", "values")

    def __init__(self, cache: KVCache, keys: Float[Tensor, "b k t hd"], values: Float[Tensor, "b k t hd"]) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    def update(
        self, keys: Float[Tensor, "b k s hd"], values: Float[Tensor, "b k s hd"]
    ) -> tuple[Float[Tensor, "b k t hd"], Float[Tensor, "b k t hd"]]:
        cache = self.cache
        if cache.slots is None:
            end = cache.start + keys.shape[2]
            self.keys[:, :, cache.start : end] = keys
            self.values[:, :, cache.start : end] = values
        else:
            self.keys[cache._rows, :, cache.slots] = keys.transpose(1, 2)
            self.values[cache._rows, :, cache.slots] = values.transpose(1, 2)
        return self.keys[:, :, : cache.extent], self.values[:, :, : cache.extent]
