"""Bytes that survive: whole files or none, an append-only journal, and a lock that a killed writer cannot leave behind."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mmtp.data.errors import DataError


class DiskFullError(DataError):
    """No room to write. What was finished before stays."""


def digest(data: bytes) -> str:
    """xxh3, 128 bits, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def readable_json(value: Any) -> str:
    """JSON with letters of all scripts as they are; lone surrogates (file names that are no UTF-8) stay escaped."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def write_durable(path: Path, data: bytes, writer: str = "") -> None:
    """Writes a file whole or not at all, and so that it stays after a power cut.

    Temporary file, fsync, rename, fsync of the folder.

    Args:
        path: where to.
        data: what.
        writer: goes into the temporary file's name, so that a writer can clean up after itself.

    Raises:
        DiskFullError: there is no room; an older file of that name is untouched.
    """
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _write_error(path, len(data), error) from error


class Journal:
    """One JSON object a line, each line with its CRC-32. A line that a crash tore off is no line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a line that is on disk when this returns.

        Raises:
            DiskFullError: there is no room; the journal is as before.
        """
        line = _sealed(entry)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                before = os.fstat(descriptor).st_size
                try:
                    if os.write(descriptor, line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(descriptor)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(descriptor, before)
                    raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _write_error(self.path, len(line), error) from error

    def read(self) -> tuple[list[dict[str, Any]], list[int]]:
        """All sound lines, and the numbers (from 1) of those that are not."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], []
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        entries, damaged = [], []
        for number, line in enumerate(lines, start=1):
            body, _, seal = line.rpartition(b" ")
            if number == len(lines):
                # What stands behind the last newline was torn off while it was written.
                damaged += [number] if line else []
            elif seal == b"%08x" % zlib.crc32(body):
                entries.append(json.loads(body))
            else:
                damaged.append(number)
        return entries, damaged

    def repair(self) -> None:
        """Takes unsound lines out. The work that they stood for is done again."""
        entries, damaged = self.read()
        if damaged:
            write_durable(self.path, b"".join(map(_sealed, entries)))


@dataclass(frozen=True)
class Share:
    """Which part of the work a writer does: every ``count``-th shard, from ``index``."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise DataError(f"shard index {self.index} of {self.count}: it must be from 0 to {self.count - 1}")

    @property
    def suffix(self) -> str:
        return "" if self.count == 1 else f"-{self.index:05d}-of-{self.count:05d}"


@contextlib.contextmanager
def locked(folder: Path, share: Share) -> Iterator[None]:
    """Holds a folder against other writers; writers with different shares of the same count go together.

    The locks belong to the process (``flock``), so they vanish with it however it ends.

    Raises:
        DataError: another writer is at it.
    """
    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(open(folder / ".lock", "a"))
        _lock(whole, fcntl.LOCK_EX if share.count == 1 else fcntl.LOCK_SH, folder)
        if share.count > 1:
            _lock(stack.enter_context(open(folder / f".lock{share.suffix}", "a")), fcntl.LOCK_EX, folder)
        for stale in folder.glob(f".*{share.suffix}.tmp"):
            stale.unlink(missing_ok=True)
        yield


def _lock(file: Any, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"{folder}: another run is writing here; wait for it, or choose another --out") from error


def _sealed(entry: dict[str, Any]) -> bytes:
    body = json.dumps(entry, separators=(",", ":"), sort_keys=True).encode()
    return b"%s %08x\n" % (body, zlib.crc32(body))


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(path: Path, size: int, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = f"{shutil.disk_usage(path.parent).free:,} bytes are free"
        except OSError:
            free = "too few are free"
        return DiskFullError(
            f"{path}: the disk is full ({size:,} bytes are to be written, {free}); what is written so far is kept: "
            "make room and run the same command again"
        )
    return DataError(f"{path}: cannot be written ({error.strerror})")
