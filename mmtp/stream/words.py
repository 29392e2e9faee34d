"""The words of a document without its media: who says what, in which order."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer

from mmtp.stream.vocab import NUM_SPECIALS, ROLES, Special, VocabLayout

_ROLE_NAMES = {int(special): role for role, special in ROLES.items()}


class Speech(NamedTuple):
    """What one side says, or what stands outside of turns.

    Attributes:
        role: whose turn it is; None outside of turns.
        runs: local ids of the text tokens, run by run; media stand between runs.
    """

    role: str | None
    runs: list[list[int]]


def is_text(tokens: Integer[np.ndarray, " s"], layout: VocabLayout) -> Bool[np.ndarray, " s"]:
    """Which tokens of a stream are words."""
    lo, hi = layout.text_range
    return (tokens >= lo) & (tokens < hi)


def skeleton(tokens: Integer[np.ndarray, " s"], layout: VocabLayout) -> Int[np.ndarray, " n"]:
    """A document with nothing left of its media but their openers and closers: what a reader of words alone knows of it."""
    tokens = np.asarray(tokens).astype(np.int64)
    return tokens[is_text(tokens, layout) | ((tokens < NUM_SPECIALS) & (tokens != Special.FEATURE))]


def speeches(tokens: Integer[np.ndarray, " n"], layout: VocabLayout) -> list[Speech]:
    """What a :func:`skeleton` says. All runs one behind the other are the text tokens of the document, in order."""
    lo, hi = layout.text_range
    found = [Speech(None, [])]
    within = False  # a run
    for token in tokens.tolist():
        if lo <= token < hi:
            if not within:
                found[-1].runs.append([])
            found[-1].runs[-1].append(token - lo)
        elif token in _ROLE_NAMES or token == Special.END:
            found.append(Speech(_ROLE_NAMES.get(token), []))
        within = lo <= token < hi
    return [speech for speech in found if speech.role or speech.runs]
