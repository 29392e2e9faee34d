"""Runs of several processes on this machine, for tests: ``python ranks.py JOBS``; prints every job's exit codes as JSON.

Processes are forked from one that has torch loaded already, with the environment that torchrun gives its workers: loading torch in each
would take most of the time.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import torch._dynamo  # FSDP2 loads it when it first runs; it had better be once
import torch.utils.tensorboard

from mmtp.data.loader import PackedBatches
from mmtp.train.model_choice import ModelChoice
from mmtp.train.recipe import Recipe, run_recipe
from mmtp.types import MmtpError


def work(job: dict, rank: int, port: int) -> None:
    size = job["processes"]
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    note_builds(Path(job["folder"], f"built-{rank}"))
    if "lost" in job and job["lost"]["rank"] == rank:
        lose_at(job["lost"]["step"])
    try:
        run_recipe(Recipe.from_dict(job["recipe"]), job["folder"], data_root=job["root"], progress=False)
    except MmtpError as error:
        Path(job["folder"], f"error-{rank}.txt").write_text(str(error))
        os._exit(2)


def note_builds(path: Path) -> None:
    """Leaves a file where this process makes a whole model."""
    model = ModelChoice.model
    ModelChoice.model = lambda self, *given: (path.touch(), model(self, *given))[1]


def lose_at(step: int) -> None:
    """Lets this process die without a word when it asks for the batch of a step."""
    batch = PackedBatches.batch
    PackedBatches.batch = lambda self, now: os.kill(os.getpid(), signal.SIGKILL) if now == step else batch(self, now)


def run(job: dict) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(job, rank, port)) for rank in range(job["processes"])]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
        process.kill()
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    print(json.dumps([run(job) for job in json.loads(sys.argv[1])]))
