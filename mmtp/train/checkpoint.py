"""Checkpoints of a run: written whole or not at all, the last few kept."""

import io
import os
from pathlib import Path
from typing import Any

import torch

from mmtp.types import MmtpError

KEPT = 2


class CheckpointError(MmtpError):
    """A checkpoint that cannot be read."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes ``step-00000123.pt`` (temporary file, fsync, rename, fsync of the folder), then removes all but the last two.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched and no partial file is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    # Serialised in memory first: torch's own writer turns a full disk into an error that does not say so.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise
    os.replace(temporary, path)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for old in sorted(folder.glob("step-*.pt"))[:-KEPT]:
        old.unlink()
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, or None. Temporary files that a killed run left do not count."""
    return max(folder.glob("step-*.pt"), default=None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; never runs code from it.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        raise CheckpointError(
            f"{path}: is damaged ({type(error).__name__}); remove it, and the run continues from the one before"
        ) from error
