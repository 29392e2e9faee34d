"""What every source promises, and what they share: reading a file with reason codes, and labels of one form."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mmtp.data.errors import DecodeError, Reason
from mmtp.data.media import read_bytes
from mmtp.types import Modality

SUFFIXES = {
    Modality.IMAGE: frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm"]),
    Modality.AUDIO: frozenset(["wav", "flac", "ogg", "oga", "opus", "mp3", "aiff", "aif", "au"]),
    Modality.VIDEO: frozenset(["mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "gif", "webp", "apng"]),
}
"""Endings by which a file counts as a medium; what it really is shows when it is decoded."""


@dataclass(frozen=True)
class Item:
    """One input, as the plan keeps it.

    Attributes:
        key: its name, unique within the source.
        file: the file it stands in, relative to the source's root.
        place: where in that file (JSON); empty for a whole file.
        size: bytes of the file or of the place in it; -1 where that is not known.
        stamp: changes when the file does: its modification time in ns, or the version of a package.
    """

    key: str
    file: str
    place: str = ""
    size: int = -1
    stamp: str = ""


@dataclass(frozen=True)
class Sample:
    """One input, read.

    Attributes:
        key: its name.
        media: the bytes of the medium's file.
        labels: what is known of it. ``caption`` is a string, ``questions`` a list of [question, answer].
    """

    key: str
    media: bytes
    labels: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Source(Protocol):
    """Inputs of one modality. Sources are picklable, so that worker processes can read."""

    @property
    def name(self) -> str:
        """What messages and the plan call it."""
        ...

    def items(self) -> list[Item]:
        """All inputs in an order that depends on nothing but the inputs."""
        ...

    def read(self, item: Item) -> Sample:
        """One input.

        Raises:
            DecodeError: it is missing, unreadable or not what was planned; the run goes on.
            DataError: nothing of this file can be trusted; the run stops.
        """
        ...


def stamp(path: Path) -> tuple[int, str]:
    """Size and modification time of a file; (-1, "") where there is none, which shows when it is read."""
    try:
        status = path.stat()
    except OSError:
        return -1, ""
    return status.st_size, str(status.st_mtime_ns)


def read_planned(path: Path, item: Item) -> bytes:
    """A whole file, which must still be the one that was planned.

    Raises:
        DecodeError: it is missing, cannot be read, or is another.
    """
    if item.size >= 0 and stamp(path) not in ((item.size, item.stamp), (-1, "")):
        raise DecodeError(Reason.CHANGED, "the file has changed since the plan was made")
    return read_bytes(path)


def parse_labels(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object of labels.

    Raises:
        DecodeError: it is none.
    """
    try:
        labels = json.loads(data)
    except ValueError as error:
        raise DecodeError(Reason.BAD_LABELS, f"{where}: no JSON ({error})") from error
    if not isinstance(labels, dict):
        raise DecodeError(Reason.BAD_LABELS, f"{where}: an object is wanted, {type(labels).__name__} given")
    return normal_labels(labels)


def normal_labels(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Labels under the names that templates know: ``text`` may stand for ``caption``, ``question`` and ``answer`` for ``questions``."""
    out = dict(labels)
    if "caption" not in out and isinstance(out.get("text"), str):
        out["caption"] = out["text"]
    if not out.get("caption", "-"):
        del out["caption"]
    if "questions" not in out and isinstance(out.get("question"), str) and isinstance(out.get("answer"), str):
        out["questions"] = [[out["question"], out["answer"]]]
    return out


def unique(items: Iterable[Item]) -> list[Item]:
    """The same items, with ``~2``, ``~3``, … behind keys that were there before."""
    seen: dict[str, int] = {}
    out = []
    for item in items:
        seen[item.key] = seen.get(item.key, 0) + 1
        key = item.key if seen[item.key] == 1 else f"{item.key}~{seen[item.key]}"
        out.append(Item(key, item.file, item.place, item.size, item.stamp))
    return out
