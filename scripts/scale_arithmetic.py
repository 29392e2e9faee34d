"""Prints what training large models takes: ``python scripts/scale_arithmetic.py``. All of it is computed, none of it measured.

Memory is :func:`mmtp.train.memory.estimate_memory`, which tests hold to measurements of small models. The main process holds a model
whole in host memory before it hands out the shares, in float32. Time of a step:

- compute: 6 N + 12 L d s FLOPs per token (PaLM, appendix B; N without embeddings that are only looked up, L blocks of width d, rows of s
  tokens), over the peak times an assumed utilisation (MFU; what activation checkpointing computes once more is not counted, and lowers it).
- communication by FSDP, per process and step: weights are gathered twice and gradients scattered once; a ring moves (S - 1) / S of them.
  Weights travel in bfloat16, gradients in float32: 2 · 2 N + 4 N bytes. With R groups, gradients are also averaged over the groups:
  2 (R - 1) / R · 4 N / S bytes over the slower links.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.next import NextHead
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.train.distributed import ParallelConfig
from mmtp.train.memory import estimate_memory
from mmtp.train.trainer import OptimConfig, RunConfig
from mmtp.types import Modality

LAYOUT = VocabLayout(TextEntry("text", 65536), (MediaEntry(Modality.IMAGE, "pictures", codebook_sizes=(16384,)),), 256)
BACKBONES = {
    "1B": BackboneConfig(width=2048, depth=20, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=6144),
    "8B": BackboneConfig(width=4096, depth=36, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=12288),
    "70B": BackboneConfig(width=8192, depth=80, num_heads=64, num_kv_heads=8, head_dim=128, mlp_width=28672),
}
MACHINE = 8
"""GPUs of a machine, joined by the fast links."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What is assumed of a GPU (H100 SXM, data sheet) and of its links (one direction).

    Attributes:
        flops: bfloat16, dense, per second.
        fast: bytes per second within a machine.
        slow: bytes per second and GPU between machines (400 Gbit/s).
        mfu: assumed share of ``flops`` that a step reaches while it computes.
    """

    flops: float = 989e12
    fast: float = 450e9
    slow: float = 50e9
    mfu: float = 0.4


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: sizes in GiB, times in seconds, rate in tokens per second over all GPUs."""

    model: str
    parameters: float
    gpus: int
    groups: int
    memory: str
    compute: float
    within: float
    between: float
    tokens: float


def size(backbone: BackboneConfig) -> tuple[int, int]:
    """Parameters of the backbone's blocks, and of a table of embeddings."""
    heads = (backbone.num_heads + 2 * backbone.num_kv_heads) * backbone.head_dim
    attention = backbone.width * (heads + backbone.num_heads * backbone.head_dim) + 2 * backbone.head_dim
    block = attention + 3 * backbone.width * backbone.mlp_width + 2 * backbone.width
    return backbone.depth * block, LAYOUT.size * backbone.width


def row(name: str, gpus: int, groups: int, rows: int, budget: int, hardware: Hardware) -> Row:
    """Arithmetic of one model on so many GPUs, ``rows`` rows each."""
    backbone = BACKBONES[name]
    blocks, table = size(backbone)
    config = UnifiedModel.Config(layout=LAYOUT, backbone=backbone, head=NextHead.Config(), tie_embeddings=False)
    run = RunConfig(steps=1, batch=rows * gpus, precision="bfloat16", parallel=ParallelConfig(replicate=groups))
    memory = estimate_memory(config, OptimConfig(), run, budget=budget, world_size=gpus, recompute=True)
    shard = gpus // groups
    tokens = rows * budget
    flops = tokens * (6 * (blocks + table) + 12 * backbone.depth * backbone.width * budget)
    moved = (shard - 1) / shard * (8 * blocks + 8 * 2 * table)  # the tables are gathered once, in float32
    reduced = 2 * (groups - 1) / groups * 4 * (blocks + 2 * table) / shard
    compute = flops / (hardware.flops * hardware.mfu)
    within = moved / (hardware.fast if shard <= MACHINE else hardware.slow)
    between = reduced / hardware.slow if gpus > MACHINE else reduced / hardware.fast
    # What is moved overlaps with what is computed, but for the first and last block.
    step = max(compute, within + between)
    return Row(
        model=name, parameters=(blocks + 2 * table) / 1e9, gpus=gpus, groups=groups, memory=str(memory), compute=compute, within=within,
        between=between, tokens=gpus * tokens / step,
    )  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| model | parameters | GPUs | groups | memory per GPU | compute | gather and scatter | average over groups | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = (
            r.model, f"{r.parameters:.2f} B", str(r.gpus), str(r.groups), r.memory, f"{r.compute:.2f} s", f"{r.within:.2f} s",
            f"{r.between:.2f} s", f"{r.tokens:,.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


PLANS = (
    ("1B", 8, 1, 4),
    ("1B", 64, 8, 4),
    ("8B", 8, 1, 1),
    ("8B", 64, 8, 1),
    ("8B", 64, 1, 1),
    ("70B", 64, 1, 1),
    ("70B", 256, 1, 1),
    ("70B", 256, 4, 1),
)
"""Model, GPUs, groups, rows per GPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=8192, help="tokens per row")
    parser.add_argument("--mfu", type=float, default=Hardware.mfu)
    given = parser.parse_args(arguments)
    rows = [row(*plan, given.budget, Hardware(mfu=given.mfu)) for plan in PLANS]
    print(markdown(rows))
    whole = {r.model: f"{r.model} {4e9 * r.parameters / 2**30:.3g} GiB" for r in rows}
    print(f"\nThe whole model in the main process's host memory: {', '.join(whole.values())}")


if __name__ == "__main__":
    main()
