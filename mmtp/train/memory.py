"""How much memory training takes of each process, told before it is taken, and blocks that take less of it.

Weights, gradients, optimizer and average are arithmetic. What the forward pass keeps for the backward pass depends on every kernel and
head, so it is measured: on tensors that have shapes but no storage, over one and two blocks, of which deeper models have more.
"""

import os
import warnings
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mmtp.models.backbone import Context
from mmtp.models.heads.base import Places
from mmtp.models.unified import UnifiedModel
from mmtp.nn.attention import document_mask
from mmtp.nn.block import Layer
from mmtp.nn.experts import Routes
from mmtp.nn.memory import PeakMemory
from mmtp.train.trainer import OptimConfig, RunConfig, hidden_matrices
from mmtp.types import MmtpError

SURE = 1.3
"""An estimate that is so many times what there is cannot be right by error alone: tests hold it to 30 % of what is measured."""


class OutOfMemory(MmtpError):
    """A run that would not fit: names the terms and what to do."""


def recompute_blocks(model: nn.Module) -> None:
    """Lets every block keep only its input for the backward pass, and compute the rest once more there (Chen et al., arXiv 1604.06174)."""
    for block in (part for part in model.modules() if isinstance(part, Layer)):
        # Blocks draw no random numbers, so there is no state of them to be kept.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that training takes of one process.

    Attributes:
        weights: this process's share, in float32.
        gathered: weights and gradients that are whole while they are used, where they are divided otherwise.
        gradients: this process's share, in float32.
        optimizer: two moments of AdamW, one of Muon.
        average: of the weights, where one is kept.
        activations: what the forward pass keeps, and what loss and backward pass need beside it.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return sum(getattr(self, term.name) for term in fields(self))

    def __str__(self) -> str:
        terms = [f"{term.name} {_gib(getattr(self, term.name))}" for term in fields(self) if getattr(self, term.name)]
        return f"{' + '.join(terms)} = {_gib(self.total)} GiB"


def estimate_memory(
    config: UnifiedModel.Config,
    optim: OptimConfig,
    run: RunConfig,
    *,
    budget: int,
    world_size: int = 1,
    recompute: bool = False,
    head_only: bool = False,
    detach: bool = True,
    chunk_rows: int = 1024,
) -> MemoryEstimate:
    """What a run takes of each process.

    Args:
        config: the model.
        optim: its optimizer.
        run: rows of the global batch, precision, how processes divide the model.
        budget: tokens per row.
        world_size: processes.
        recompute: whether activations are computed once more, as :func:`recompute_blocks` lets them.
        head_only: whether the head alone is trained.
        detach: whether the head's gradients end at the backbone.
        chunk_rows: rows whose logits are in memory at a time.
    """
    shard = run.parallel.sizes(world_size)[1]
    half = run.precision == "bfloat16"
    rows = run.batch // world_size
    # What more blocks take is told by the least number of them after which all parts come again.
    unit = config.backbone.cross_attention_every or 1
    units = config.backbone.depth / unit
    one, two = (
        _measure(config, blocks, rows, budget, half=half, divided=shard > 1, recompute=recompute, head_only=head_only, detach=detach)
        for blocks in (unit, 2 * unit)
    )
    deep = _Size(*(round(first + (units - 1) * (second - first)) for first, second in zip(one, two, strict=True)))
    block = (two.weights - one.weights) // unit
    width, choices = config.backbone.width, max(sum(high - low for low, high in slot.generable) for slot in config.layout.slots)
    word = 2 if half else 4
    table = 4 * config.layout.size * width
    logits = min(chunk_rows, rows * budget) * choices * (4 + 2 * word) + word * choices * width
    moments = 4 * (2 * deep.trained - deep.matrices) if optim.muon_lr else 8 * deep.trained
    return MemoryEstimate(
        weights=4 * deep.weights // shard,
        # The root's weights and gradients are whole; of blocks, that in use and the next one are, and the gradients of one.
        gathered=(8 * one.root + 2 * word * block + (word + 4) * block) if shard > 1 else 0,
        gradients=4 * deep.trained // shard,
        optimizer=moments // shard,
        average=4 * deep.weights // shard if optim.ema else 0,
        activations=max(deep.backward, deep.forward + logits) + table,
    )


def check_memory(estimate: MemoryEstimate, available: int) -> None:
    """Compares an estimate with what there is.

    Raises:
        OutOfMemory: it cannot fit. Where it is only likely not to, there is a warning.
    """
    if estimate.total <= available:
        return
    line = (
        f"run: each process needs about {estimate}, and {_gib(available)} GiB are free; lower run.batch or data.budget, "
        "set model.activation_checkpointing = true, or divide the model among more processes"
    )
    if estimate.total > SURE * available:
        raise OutOfMemory(line)
    warnings.warn(line, stacklevel=2)


def check_host(parameters: int, available: int) -> None:
    """Whether the main process of several can hold a model whole, as it does before it hands out the shares and when it saves the result.

    Args:
        parameters: of the model.
        available: bytes of its host.

    Raises:
        OutOfMemory: it cannot.
    """
    if 4 * parameters > available:
        raise OutOfMemory(
            f"run: the main process first holds the whole model in host memory, {_gib(4 * parameters)} GiB, and {_gib(available)} GiB "
            "are free; let it run on a machine with more"
        )


def surely_fits(config: UnifiedModel.Config, tokens: int, available: int) -> bool:
    """Whether a model is so small that there is no need to measure: a generous bound that takes no time.

    Args:
        config: the model.
        tokens: of a process's rows.
        available: bytes.
    """
    with torch.device("meta"):
        model = UnifiedModel(config)
    blocks = config.backbone.depth + model.head.mtp_depth
    return 40 * model.num_parameters() + tokens * (500 * blocks * config.backbone.width + 32 * config.layout.size) < available // 2


def available_memory(device: torch.device) -> int:
    """Bytes that are free on an accelerator, or this process's part of those that are free in the host and its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_memory() -> int:
    """Bytes that are free in the host and this process's control group."""
    free = next(1024 * int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


class _Size(NamedTuple):
    """Parameters: all, the root's alone, those that are trained, those that Muon would train.

    Bytes: kept by the forward pass; most at any time of the backward pass, without gradients of parameters.
    """

    weights: int
    root: int
    trained: int
    matrices: int
    forward: int
    backward: int


def _measure(
    config: UnifiedModel.Config,
    blocks: int,
    rows: int,
    budget: int,
    *,
    half: bool,
    divided: bool,
    recompute: bool,
    head_only: bool,
    detach: bool,
) -> _Size:
    """Sizes of a model with so many blocks in the backbone."""
    with FakeTensorMode():
        model = UnifiedModel(replace(config, backbone=replace(config.backbone, depth=blocks)))
        if head_only:
            model.requires_grad_(False)
            model.head.requires_grad_(True)
        if recompute:
            recompute_blocks(model)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        counts = (
            sum(sizes.values()),
            sum(size for name, size in sizes.items() if not name.startswith(("backbone.blocks.", "backbone.cross.", "head."))),
            sum(p.numel() for p in trained),
            sum(p.numel() for p in hidden_matrices(model)),
        )
        if divided and half:  # blocks are gathered in bfloat16; otherwise autocast keeps a copy of every weight
            for part in (*model.backbone.blocks.modules(), *model.backbone.cross.modules(), *model.head.modules()):
                for name, p in part.named_parameters(recurse=False):
                    setattr(part, name, nn.Parameter(p.detach().bfloat16(), requires_grad=p.requires_grad))
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_drop)
        with PeakMemory(model.parameters()) as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                tokens = torch.zeros(rows, budget, dtype=torch.long)
                mask = document_mask(tokens)
                x = model.embedding(tokens)
                places = Places(tokens.unsqueeze(2).expand(-1, -1, 3), tokens, tokens, mask)
                read = x.detach() if detach else x
                context = Context(torch.zeros_like(x), mask) if config.backbone.cross_attention_every else None
                routes = _even_routes(model, tokens)
                states = model.compute_states(x, places.positions, mask, read, places, detach, routes=routes, context=context)
            learning = [state for state in states if state.requires_grad]
            grads = [torch.empty_like(state) for state in learning]
            forward = memory.live
            torch.autograd.backward(learning, grads)
    return _Size(*counts, forward, memory.peak)


def _even_routes(model: UnifiedModel, tokens: Tensor) -> Routes | None:
    """As many positions for each medium; what they take depends on their number alone, and hardly on how they divide it."""
    if not model.backbone.num_experts:
        return None
    places = torch.arange(tokens.numel())
    return Routes(tokens.flatten(), places.tensor_split(model.backbone.num_experts), places)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g}"
