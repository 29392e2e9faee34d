"""Checkpoints of a run: written whole or not at all, the last few kept.

One process writes a file, ``step-00000123.pt``. Several write a folder, ``step-00000123``, by ``torch.distributed.checkpoint``: each what
it holds. A folder is read by any number of processes, one among them.
"""

import io
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from mmtp.train.distributed import World, lost_process
from mmtp.types import MmtpError

KEPT = 2

PARTS = ".parts"
"""Ending of a folder that is being written."""


class CheckpointError(MmtpError):
    """A checkpoint that cannot be read or written."""


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
    _publish(temporary, path)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, or None. What a killed run left under a temporary name does not count."""
    return max(_checkpoints(folder), key=lambda path: path.stem, default=None)


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


class ShardedCheckpoints:
    """Checkpoints of several processes, written while training goes on; every process must call every method alike.

    Args:
        folder: receives them.
        world: the processes.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self._path = folder
        self._under_way: Future[Any] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copies the state to host memory and leaves the rest to a thread. The one before is waited for; a step is saved once.

        Raises:
            CheckpointError: the one before could not be written.
        """
        path = self.folder / f"step-{step:08d}"
        if path == self._path:
            return
        self.wait()
        self._path = path
        temporary = self._path.with_suffix(PARTS)
        if self.world.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.wait()
        self._under_way = dcp.async_save(state, checkpoint_id=temporary, process_group=self.world.saving)  # pyrefly: ignore

    def settle(self) -> None:
        """Gives a checkpoint its name once all of it is written; to be called every now and then.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._under_way is None:
            return
        future, self._under_way = self._under_way, None
        try:
            future.result()
        except dcp.CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            if lost_process(first):
                raise first from error
            raise CheckpointError(
                f"{self._path}: cannot be written ({first}); make room and run the same command again: "
                "it continues from the last checkpoint"
            ) from error
        if self.world.main:  # what it has written last tells it that the others are done
            shutil.rmtree(self._path, ignore_errors=True)
            _publish(self._path.with_suffix(PARTS), self._path)


def load_sharded(path: Path, state: dict[str, Any]) -> None:
    """Reads a folder into a state of the same structure, in place: every process what it holds of it.

    Raises:
        CheckpointError: the folder is damaged, or of another model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is, where one process reads
            dcp.load(state, checkpoint_id=path)
    except (dcp.CheckpointException, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{path}: is damaged or of another model ({type(error).__name__}); remove it, and the run continues from the one before"
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.suffix in ("", ".pt")]


def _publish(temporary: Path, path: Path) -> None:
    """Renames what is complete, so that it survives a loss of power, and removes all but the last few checkpoints."""
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for unfinished in path.parent.glob(f"step-*{PARTS}"):  # by a run that was killed
        shutil.rmtree(unfinished)
    for old in sorted(_checkpoints(path.parent), key=lambda found: found.stem)[:-KEPT]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
