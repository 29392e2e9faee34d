"""WebDataset archives: files of a tar whose names agree up to the first dot are one sample.

Nothing is unpacked: the index keeps offsets, and only regular members are ever read. Labels are JSON and text; members of other
kinds (pickles, arrays) are left alone.
"""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmtp.data.errors import DataError, DecodeError, Reason
from mmtp.data.sources.base import SUFFIXES, Item, Sample, normal_labels, parse_labels, stamp, unique
from mmtp.types import Modality

_CAPTIONS = ("txt", "caption")


@dataclass(frozen=True)
class WebDatasetSource:
    """Uncompressed tar files, in the order of their names.

    Attributes:
        root: folder that the archives' names are relative to.
        files: the archives.
        modality: which members are the medium.
    """

    root: Path
    files: tuple[str, ...]
    modality: Modality

    @property
    def name(self) -> str:
        return str(self.root / (self.files[0] if len(self.files) == 1 else "*.tar"))

    def items(self) -> list[Item]:
        return unique(item for file in self.files for item in self._index(file))

    def read(self, item: Item) -> Sample:
        path, place = self.root / item.file, json.loads(item.place)
        if stamp(path)[1] != item.stamp:
            raise DataError(f"{path}: has changed or gone since the plan was made; choose another --out, or bring the old file back")
        members: dict[str, list[int]] = place["members"]
        medium = next((name for name in members if _kind(name) in SUFFIXES[self.modality]), None)
        if medium is None:
            raise DecodeError(Reason.MISSING, f"the sample has no {self.modality}")
        with open(path, "rb") as archive:

            def member(name: str) -> bytes:
                archive.seek(members[name][0])
                return archive.read(members[name][1])

            labels: dict[str, Any] = {}
            for name in members:
                if _kind(name) in _CAPTIONS:
                    labels["caption"] = member(name).decode("utf-8", "replace").strip()
                elif _kind(name) == "json":
                    labels |= parse_labels(member(name), f"{item.key}.{name}")
            return Sample(item.key, member(medium), normal_labels(labels))

    def _index(self, file: str) -> list[Item]:
        path = self.root / file
        bytes_, time = stamp(path)
        samples: dict[str, dict[str, list[int]]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isreg() or member.issparse():
                        continue
                    if member.offset_data + member.size > bytes_:
                        raise tarfile.ReadError("unexpected end of data")
                    pure = PurePosixPath(member.name)
                    stem, _, ending = pure.name.partition(".")
                    if stem and ending:
                        samples.setdefault(str(pure.with_name(stem)), {})[ending] = [member.offset_data, member.size]
                _check_end(path, archive.offset)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except tarfile.TarError as error:
            raise DataError(
                f"{path}: is cut off, damaged or compressed ({error}); {len(samples)} samples stand before that place. "
                "Fetch it again, or unpack the compression: members must be reachable by offset"
            ) from error
        return [
            Item(key, file, json.dumps({"members": members}), sum(size for _, size in members.values()), time)
            for key, members in samples.items()
        ]


def _check_end(path: Path, offset: int) -> None:
    """Tarfile takes a damaged or cut header for the end of the archive; the true end is zeros or the end of the file."""
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(512).strip(b"\0"):
            raise tarfile.ReadError(f"damaged header at byte {offset}")


def _kind(ending: str) -> str:
    """The last part of a member's ending: ``seg.png`` is a png."""
    return ending.rpartition(".")[2].lower()
