"""Two text tokenizers side by side: where their tokens begin together, and which tokens they have in common."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int


def shared_boundaries(a: Sequence[bytes], b: Sequence[bytes]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Tokens that begin at the same byte in two tokenizations of one text.

    Before such a token both tokenizers have read the same bytes, so that their next-token distributions answer one question.

    Args:
        a: bytes of every token of the one.
        b: bytes of every token of the other.

    Returns:
        Indices into ``a`` and into ``b`` of the tokens that begin together, in order. None, where the bytes of the two differ: a tokenizer
        that normalises, or that lacks a byte, has read another text.
    """
    if b"".join(a) != b"".join(b):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    starts = [np.cumsum([0, *map(len, pieces)], dtype=np.int64)[:-1] for pieces in (a, b)]
    # A token of no bytes begins where the next one does: of equal starts the last one has read all that stands before.
    _, first, second = np.intersect1d(starts[0][::-1], starts[1][::-1], return_indices=True)
    return len(a) - 1 - first, len(b) - 1 - second


def shared_tokens(a: Mapping[bytes, int], b: Mapping[bytes, int]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Ids of the byte strings that are tokens of both vocabularies: those of ``a`` in ascending order, and those of ``b`` to them."""
    pairs = sorted((id_, b[data]) for data, id_ in a.items() if data in b)
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]
