"""Training in several processes: who takes part, what each of them holds, and what they must agree on.

A launcher (``torchrun``) starts the processes. Every process takes its rows of the global batch, and holds its share of weights, gradients,
optimizer state and average (ZeRO stage 3, arXiv 1910.02054, section 5; here by FSDP2, ``torch.distributed.fsdp.fully_shard``). A block's
weights are gathered when it is its turn and freed after it. Groups of processes may each hold a copy of the whole between them
(hybrid sharding, arXiv 2304.11277, section 3.2.2), so that weights are gathered within fast links only.

A model is divided before it has weights. Those that training starts from are whole in the main process alone, while it hands out the
shares; where there is a checkpoint to go on from, in none.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mmtp.config import Config, ConfigError
from mmtp.nn.block import Layer
from mmtp.types import MmtpError

PATIENCE = timedelta(hours=12)
"""How long processes wait for what one of them does by itself: making or writing a large model takes longer than a step ever does.
One that is lost is missed at once, by its connection."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """How the processes of a run divide the model.

    Attributes:
        replicate: groups of processes that each hold the whole model between them; gradients are averaged over the groups.
        shard: processes of a group; 0 stands for all that there are, divided by ``replicate``.
    """

    replicate: int = 1
    shard: int = 0

    def __post_init__(self) -> None:
        if self.replicate < 1 or self.shard < 0:
            raise ValueError(f"replicate {self.replicate}, shard {self.shard}: at least 1, and at least 0, are wanted")

    def sizes(self, processes: int) -> tuple[int, int]:
        """Number of groups, and processes per group.

        Raises:
            ConfigError: they do not make up the number of processes.
        """
        shard = self.shard or processes // self.replicate
        if self.replicate * shard != processes:
            raise ConfigError(
                f"run.parallel: replicate {self.replicate} x shard {self.shard or 'rest'} does not make up {processes} processes; "
                "change them, or the number that is launched"
            )
        return self.replicate, shard


class World:
    """The processes of a run, seen from one of them. Made without a mesh it is a single process, and its methods change nothing.

    Args:
        device: of this process.
        mesh: of all processes: axes ``replicate`` and ``shard``.

    Attributes:
        rank: number of this process.
        size: number of processes.
        group: all of them, for sums over a batch; None for a single process.
        saving: all of them once more: what a thread says in one group must not mix with what training says in the other. Here they wait
            for what one of them makes or writes.
    """

    def __init__(self, device: torch.device | None = None, mesh: DeviceMesh | None = None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.mesh = mesh
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if mesh else (0, 1)
        self.group = dist.group.WORLD if mesh else None
        self.saving: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if mesh else None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes logs and results."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        """Mean of a number over all processes, the same in each."""
        if self.group is None:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.item() / self.size

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.group is not None:
            dist.barrier(self.saving)

    def shard(self, model: nn.Module, precision: Literal["float32", "bfloat16"] = "float32") -> None:
        """Divides a model's parameters among the processes, in place: each block by itself, the head, and what is left.

        Each process then has room for its shares, and numbers in it when :meth:`fill` or a checkpoint has given them.

        Args:
            model: equal in all processes, and made :func:`~mmtp.nn.memory.without_weights`.
            precision: in which the weights of blocks are gathered and used; shares, gradients' sums and what is left stay float32.
        """
        if self.mesh is None:
            return
        dtype = torch.bfloat16 if precision == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for name, part in reversed(list(model.named_modules())):  # inner ones before those that they are parts of
            if (isinstance(part, Layer) or name == "head") and any(True for _ in part.parameters()):
                fully_shard(part, mesh=self.mesh, mp_policy=policy)
        # Embedding and unembedding stay whole until the backward pass has ended: the loss reads them after the forward pass.
        fully_shard(model, mesh=self.mesh, reshard_after_forward=False)
        buffers = [buffer.clone() for buffer in model.buffers()]
        model.to_empty(device=self.device)
        for empty, known in zip(model.buffers(), buffers, strict=True):
            empty.copy_(known)

    @torch.no_grad()
    def fill(self, model: nn.Module, make: Callable[[], nn.Module]) -> None:
        """Gives every process its shares of weights that are whole in the host memory of the main process alone; every process must ask.

        Args:
            model: divided.
            make: called in the main process: a model with the same parameters and buffers.

        Raises:
            MmtpError: the model cannot be made; in every process.
        """
        source = self._made(make)
        for name, own in model.named_parameters():
            assert isinstance(own, DTensor)
            # What the others bring is not read, and of memory that is not touched a host gives none.
            weight = torch.empty(own.shape, device=self.device) if source is None else source.get_parameter(name).detach()
            local(own).copy_(local(distribute_tensor(weight, own.device_mesh, own.placements)))
        for name, own in model.named_buffers():
            if source is not None:
                own.copy_(source.get_buffer(name))
            dist.broadcast(own, 0, group=self.group)

    def _made(self, make: Callable[[], nn.Module]) -> nn.Module | None:
        """What the main process makes, there; where it cannot, every process says why."""
        made, failure = None, None
        if self.main:
            try:
                made = make()
            except MmtpError as error:
                failure = error
        said = [str(failure) if failure else None]
        dist.broadcast_object_list(said, 0, group=self.saving)
        if said[0] is not None:
            raise failure or MmtpError(said[0])
        return made


@contextmanager
def joined(parallel: ParallelConfig) -> Iterator[World]:
    """The world that a launcher has made, or a single process where there was none.

    Raises:
        ConfigError: ``parallel`` does not fit the number of processes.
    """
    if processes() == 1:
        yield World()
        return
    sizes = parallel.sizes(processes())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard")))
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """Number of processes that a launcher has started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them, known before any has met another."""
    return int(os.environ.get("RANK", "0"))


def lost_process(error: BaseException) -> bool:
    """Whether an error says that another process cannot be reached any more. Gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module, world: World) -> dict[str, Tensor]:
    """State of a divided module with every tensor whole, in the main process's host memory; what is shared under two names stays so.

    Every process must ask for it; the others get nothing.
    """
    found: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in found:
            gathered = whole(value.detach())
            found[id(value)] = gathered.cpu() if world.main else gathered.new_empty(0)
        if world.main:
            state[name] = found[id(value)]
    return state
