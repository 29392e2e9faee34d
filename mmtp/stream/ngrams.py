"""Counts of which text token followed which others: a language model without weights, good for drafts of words.

Of a stream, text is what stands in places of text: words, roles, openers, dims. Codes are left out, so that what comes before a picture
is read on behind it. Probabilities of all lengths of context are interpolated as Witten & Bell do (1991, method C): after a context that
was seen n times with d different tokens behind it, the shorter one has the weight d / (n + d).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt32, UInt64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.vocab import VocabLayout, VocabMismatch
from mmtp.types import MmtpError, Modality

MOST_KEPT = 2**14
"""Answers that are kept: texts go through the same contexts over and over."""

_MULTIPLIER, _BITS = 0x9E3779B97F4A7C15, 2**64 - 1


class NGramError(MmtpError):
    """Counts that cannot be made or read."""


class NGrams:
    """N-grams of text over one vocabulary.

    Contexts of all lengths stand in one table, by a hash of 64 bits; that two share one is next to impossible and would cost a draft.

    Args:
        layout: the vocabulary.
        order: greatest n; contexts have up to ``order - 1`` tokens.
        keys: hashes of the contexts, ascending.
        starts: where the followers of each context begin, and where all end.
        followers: tokens, most frequent first.
        counts: of each follower.
    """

    def __init__(
        self,
        layout: VocabLayout,
        order: int,
        keys: UInt64[np.ndarray, " contexts"],
        starts: UInt32[np.ndarray, " contexts+1"],
        followers: UInt32[np.ndarray, " n"],
        counts: UInt32[np.ndarray, " n"],
    ) -> None:
        self.layout, self.order = layout, order
        self.keys, self.starts, self.followers, self.counts = keys, starts, followers, counts
        self._found: dict[tuple[int, ...], tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]] = {}

    @classmethod
    def count(cls, documents: Iterable[Int[np.ndarray, " _"]], layout: VocabLayout, order: int = 6) -> "NGrams":
        """Counts the n-grams of documents. Documents with the same text count once.

        Args:
            documents: tokens of each, by the vocabulary.
            layout: the vocabulary.
            order: greatest n.

        Raises:
            NGramError: the order is below 2, or there is no text.
        """
        if order < 2:
            raise NGramError(f"order {order}: at least 2 is wanted, a token and the one before it")
        grammar = StreamGrammar(layout)
        text = np.array([slot.modality is Modality.TEXT for slot in layout.slots])
        different = dict.fromkeys(_texts(documents, grammar, text))
        hashes, followers = [], []
        for encoded in different:
            tokens = np.frombuffer(encoded, dtype=np.uint64)
            key = np.zeros(len(tokens), dtype=np.uint64)
            for length in range(1, min(order, len(tokens))):
                # Of every token from the `length`-th on: the hash of so many before it, the nearest first.
                key = key[1:] * np.uint64(_MULTIPLIER) + tokens[:-length] + np.uint64(1)
                hashes.append(key)
                followers.append(tokens[length:])
        if not hashes:
            raise NGramError("no text to count: none of the documents has two tokens of it")
        pairs, counts = np.unique(np.stack([np.concatenate(hashes), np.concatenate(followers)]), axis=1, return_counts=True)
        ordered = np.lexsort((pairs[1], -counts, pairs[0]))
        keys, starts = np.unique(pairs[0][ordered], return_index=True)
        starts = np.append(starts, len(counts)).astype(np.uint32)
        return cls(layout, order, keys, starts, pairs[1][ordered].astype(np.uint32), counts[ordered].astype(np.uint32))

    def predict(self, context: Sequence[int]) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """What follows: all tokens that were seen after the last one, and their probabilities; none where that was never seen.

        Args:
            context: text before it; no more than the last ``order - 1`` tokens count.
        """
        read = tuple(context[-(self.order - 1) :])
        if (found := self._found.get(read)) is None:
            if len(self._found) >= MOST_KEPT:
                self._found.clear()
            found = self._found[read] = self._interpolated(read)
        return found

    def _interpolated(self, context: tuple[int, ...]) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        key, known = 0, dict[int, float]()
        for token in reversed(context):
            key = (key * _MULTIPLIER + token + 1) & _BITS
            at = int(self.keys.searchsorted(np.uint64(key)))
            if at == len(self.keys) or self.keys[at] != key:
                break
            first, end = self.starts[at], self.starts[at + 1]
            counts = self.counts[first:end].tolist()
            different, seen = (len(counts) if known else 0), sum(counts)
            weight = 1 / (seen + different)
            known = {token: different * weight * share for token, share in known.items()}
            for follower, count in zip(self.followers[first:end].tolist(), counts, strict=True):
                known[follower] = known.get(follower, 0.0) + count * weight
        return np.array(list(known), dtype=np.int64), np.array(list(known.values()))

    def save(self, path: Path) -> None:
        """Writes a file of safetensors."""
        arrays = {"keys": self.keys, "starts": self.starts, "followers": self.followers, "counts": self.counts}
        save_file(arrays, path, {"order": str(self.order), "layout": self.layout.hash})

    @classmethod
    def load(cls, path: Path, layout: VocabLayout) -> "NGrams":
        """Reads what :meth:`save` wrote.

        Raises:
            VocabMismatch: it was counted over another vocabulary.
            NGramError: the file is damaged.
        """
        try:
            with safe_open(path, "numpy") as file:
                about = file.metadata() or {}
                arrays = [file.get_tensor(name) for name in ("keys", "starts", "followers", "counts")]
            order = int(about["order"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise NGramError(f"{path}: is damaged ({error}); count again with mmtp ngrams, or fetch it again") from error
        if about.get("layout") != layout.hash:
            raise VocabMismatch(f"{path}: was counted over another vocabulary than the model's; count again with mmtp ngrams")
        return cls(layout, order, *arrays)


def _texts(documents: Iterable[Int[np.ndarray, " _"]], grammar: StreamGrammar, text: Bool[np.ndarray, " slots"]) -> Iterable[bytes]:
    """The text of each document."""
    for tokens in documents:
        yield tokens[text[grammar.analyse(tokens).slots]].astype(np.uint64).tobytes()
