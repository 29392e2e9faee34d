"""What can be wrong with data: one input (it goes to quarantine, the run goes on), or the whole (the run stops)."""

from enum import StrEnum
from typing import Any

from mmtp.types import MmtpError


class DataError(MmtpError):
    """A source, or a folder of shards, that cannot be used as it stands."""


class Reason(StrEnum):
    """Why an input went to quarantine."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    CHANGED = "changed"
    EMPTY = "empty"
    NOT_MEDIA = "not-media"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too-large"
    UNSUPPORTED = "unsupported"
    NOT_FINITE = "not-finite"
    BAD_LABELS = "bad-labels"
    NO_LABELS = "no-labels"
    NOT_ENCODABLE = "not-encodable"


class DecodeError(MmtpError):
    """An input that cannot be used. ``reason`` is the code that quarantine.jsonl keeps; the text says what was found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))
