"""What a sample's labels say, in words: captions as a wording puts them together, questions with their answers, and when words are said."""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from mmtp.data.errors import DataError, DecodeError, Reason

CAPTION = "{caption}"
"""The wording that is the caption itself."""

_FIELD = re.compile(r"\{(\w+)\}")


def check_wording(wording: str) -> None:
    """Raises:
    DataError: no label stands in the wording, or a brace is none of a label's.
    """
    if not _FIELD.search(wording) or set(_FIELD.sub("", wording)) & set("{}"):
        raise DataError(f"caption {wording!r}: write labels in braces, as in '{{caption}}, {{style}} style'")


def word(wording: str, labels: dict[str, Any]) -> str | None:
    """A wording with labels put in; lists become "one, two". None where a label that it names is missing or empty.

    Raises:
        DecodeError: a label is neither words, a number nor a list of them.
    """
    found = {name: _words(name, labels.get(name)) for name in _FIELD.findall(wording)}
    return _FIELD.sub(lambda match: found[match[1]], wording) if all(found.values()) else None


def captions(labels: dict[str, Any], wordings: Sequence[str] = (CAPTION,)) -> list[str]:
    """The caption in every wording whose labels are there, each once.

    Raises:
        DecodeError: a label is of another form.
    """
    return list(dict.fromkeys(text for wording in wordings if (text := word(wording, labels))))


def questions(labels: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs.

    Raises:
        DecodeError: the label is of another form.
    """
    found = labels.get("questions", [])
    sound = isinstance(found, Iterable) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in found
    )
    if not sound:
        raise DecodeError(Reason.BAD_LABELS, f"questions: a list of [question, answer] is wanted, {found!r:.80} given")
    return tuple((question, answer) for question, answer in found)


def timed(labels: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """What is said in a recording, piece by piece, and the seconds at which each begins.

    Raises:
        DecodeError: the label is of another form, or does not begin at 0 and go up.
    """
    found = labels.get("timed", [])
    if not isinstance(found, list) or not all(map(_is_timed, found)):
        raise DecodeError(Reason.BAD_LABELS, f"timed: a list of [words, seconds] is wanted, {found!r:.80} given")
    starts = [seconds for _, seconds in found]
    if starts and (starts[0] != 0 or any(a >= b for a, b in pairwise(starts))):
        raise DecodeError(Reason.BAD_LABELS, f"timed: seconds begin at 0 and go up, {starts!r:.80} given")
    return tuple((words, float(seconds)) for words, seconds in found)


def _is_timed(pair: Any) -> bool:
    sound = isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int | float)
    return sound and math.isfinite(pair[1])


def _words(name: str, value: Any) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case int() | float() if not isinstance(value, bool) and name != "caption":
            return str(value)
        case list() if all(isinstance(part, str) for part in value) and name != "caption":
            return ", ".join(value)
    raise DecodeError(Reason.BAD_LABELS, f"{name}: a string is wanted, {value!r:.80} given")
