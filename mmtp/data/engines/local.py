"""Work on one machine: in this process, or in processes of its own."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from mmtp.data.errors import DataError

R = TypeVar("R", covariant=True)


@runtime_checkable
class Work(Protocol[R]):
    """Picklable work in numbered units; each unit is a pure function of its number."""

    def open(self) -> Callable[[int], R]:
        """Loads what the units need, once per process, and returns what does one."""
        ...


class LocalEngine(Generic[R]):
    """Does units of work, in any order, each once.

    Every process computes on one thread: so what comes out does not depend on the number of workers, and cores are not fought for.

    Args:
        workers: processes; 1 works in this process; None takes one per core. A script that asks for more than one needs the usual
            ``if __name__ == "__main__":``, because processes are spawned.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = cores() if workers is None else workers
        if self.workers < 1:
            raise DataError(f"workers: at least 1 is wanted, {self.workers} given")

    def run(self, work: Work[R], units: Sequence[int]) -> Iterator[R]:
        """Yields results as they come.

        Raises:
            DataError: a worker died. Results that were ready are yielded before any error is raised.
        """
        if self.workers == 1 or len(units) <= 1:
            with _one_thread():
                yield from map(work.open(), units)
            return
        todo = iter(units)
        context = multiprocessing.get_context("spawn")
        # Pickled by hand: the pool's own pickler would put tensors into shared memory, which is scarce in containers.
        start = (pickle.dumps(work), os.getpid())
        executor = ProcessPoolExecutor(min(self.workers, len(units)), mp_context=context, initializer=_start, initargs=start)
        running: set[Future[R]] = set()
        error: BaseException | None = None
        try:
            while True:
                while error is None and len(running) < 2 * self.workers and (unit := next(todo, None)) is not None:
                    running.add(executor.submit(_do, unit))
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    if future.cancelled():
                        continue
                    if (failure := future.exception()) is None:
                        yield future.result()
                    elif error is None:
                        error = failure
                        for other in running:
                            other.cancel()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                "a worker process died (out of memory, or killed); what is finished is kept: run the same command again, with fewer workers"
            ) from error
        if error is not None:
            raise error


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_unit: Callable[[int], Any]


def _start(work: bytes, parent: int) -> None:
    """Set-up of a worker process."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # files are written whole or not at all, so dying at once is safe
    threading.Thread(target=_die_with_parent, args=(parent,), daemon=True).start()
    global _unit
    _unit = pickle.loads(work).open()


def _do(unit: int) -> Any:
    return _unit(unit)


def _die_with_parent(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""
    process = multiprocessing.parent_process()
    if process is not None and os.getppid() == parent:
        process.join()
    os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
