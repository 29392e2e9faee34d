"""Files in a folder, and files named by a JSONL manifest."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtp.data.errors import DataError, DecodeError, Reason
from mmtp.data.media import read_bytes
from mmtp.data.sources.base import SUFFIXES, Item, Sample, normal_labels, parse_labels, read_planned, stamp, unique
from mmtp.types import Modality

MEDIA_FIELDS = ("file_name", "path", "image", "audio", "video")


@dataclass(frozen=True)
class FolderSource:
    """All media below a folder, sorted by path. Labels stand beside them: ``cat.jpg``, ``cat.txt`` (caption), ``cat.json`` (object).

    Attributes:
        root: the folder.
        modality: which files count.
    """

    root: Path
    modality: Modality

    @property
    def name(self) -> str:
        return str(self.root)

    def items(self) -> list[Item]:
        items = []
        for folder, folders, files in os.walk(self.root):
            folders.sort()
            for file in files:
                path = Path(folder, file)
                if path.suffix.lower().lstrip(".") in SUFFIXES[self.modality]:
                    name = path.relative_to(self.root).as_posix()
                    items.append(Item(name, name, "", *stamp(path)))
        return sorted(items, key=lambda item: item.key)

    def read(self, item: Item) -> Sample:
        path = self.root / item.file
        media = read_planned(path, item)
        labels: dict[str, Any] = {}
        if (beside := path.with_suffix(".txt")).is_file():
            labels["caption"] = read_bytes(beside).decode("utf-8", "replace").strip()
        if (beside := path.with_suffix(".json")).is_file():
            labels |= parse_labels(read_bytes(beside), beside.name)
        return Sample(item.key, media, normal_labels(labels))


@dataclass(frozen=True)
class ManifestSource:
    """A JSONL file with one object a line: the medium's path (``file_name``, ``path``, ``image``, ``audio`` or ``video``;
    relative to the manifest), a ``key`` if you like, and labels.

    Attributes:
        path: the manifest.
    """

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def items(self) -> list[Item]:
        items, offset = [], 0
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = json.dumps({"line": number, "offset": offset, "length": len(line)})
                try:
                    entry = self._entry(line, number)
                    file = self._media(entry, number)
                    item = Item(str(entry.get("key", file)), file, place, *stamp(self.path.parent / file))
                except DecodeError:
                    # The line stays an input of its own, so that quarantine names it.
                    item = Item(f"line {number}", "", place)
                items.append(item)
            offset += len(line)
        return unique(items)

    def read(self, item: Item) -> Sample:
        place = json.loads(item.place)
        try:
            with open(self.path, "rb") as manifest:
                manifest.seek(place["offset"])
                line = manifest.read(place["length"])
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        entry = self._entry(line, place["line"])
        if self._media(entry, place["line"]) != item.file:
            raise DataError(f"{self.path}: line {place['line']} has changed since the plan was made; choose another --out")
        labels = {k: v for k, v in entry.items() if k != "key" and k not in MEDIA_FIELDS}
        return Sample(item.key, read_planned(self.path.parent / item.file, item), labels)

    def _entry(self, line: bytes, number: int) -> dict[str, Any]:
        return parse_labels(line, f"{self.path.name} line {number}")

    def _media(self, entry: dict[str, Any], number: int) -> str:
        for field in MEDIA_FIELDS:
            if isinstance(entry.get(field), str):
                return entry[field]
        raise DecodeError(Reason.BAD_LABELS, f"{self.path.name} line {number}: names no file; one of {', '.join(MEDIA_FIELDS)} is wanted")
