"""Times training steps by head, and beside ``transformers``: ``python scripts/bench_train.py --threads 2``.

All ways train the same backbone on the same packed batches of captions and pictures, forward, backward and AdamW. They follow each
other in turn (A B C ... A B C ...), so that what else the machine does hits all alike:

- ``next``: next-token prediction, which the others are measured against;
- ``depth``, ``parallel``, ``sequential``, ``shared``, ``synchronized``: with ``--mtp-depth`` further tokens, detached as the loss has it
  by default, from ``--anchors`` of the positions;
- ``modality_specific``: next-token prediction by a backbone in which words and pictures have norms and feed-forward layers of their own;
- ``transformers``: Qwen3ForCausalLM of the same sizes and vocabulary, next-token loss over the whole vocabulary, as its Trainer calls it;
- ``next_compiled``, ``transformers_compiled``: both through torch.compile, as ``[model] compile = true`` and the Trainer's
  ``torch_compile=True`` have it.

With ``--whole-rows`` a row is one document instead of many, so that attention over documents alone has nothing to save.

Peak memory is what tensors made within one forward and backward pass hold at most; weights and the optimizer's state are not in it, and
of compiled ways it is not measured.
The table has medians, 90th percentiles and ratios to ``next``.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmtp.models.backbone import BackboneConfig
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.nn.memory import PeakMemory
from mmtp.registry import REGISTRY
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.types import Batch, Modality, Segment

SIZES = {
    "tiny": BackboneConfig(width=64, depth=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_width=128),
    "small": BackboneConfig(width=256, depth=10, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=704),
    "medium": BackboneConfig(width=512, depth=12, num_heads=8, num_kv_heads=4, head_dim=64, mlp_width=1408),
}
LAYOUT = VocabLayout(TextEntry("words", 4096), (MediaEntry(Modality.IMAGE, "pictures", codebook_sizes=(4096,)),), 64)
WARM_UP = 2  # rounds that are not counted; compiled ways compile in the first


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a training step of one way costs.

    Attributes:
        way: head, ``modality_specific``, ``transformers``, or one that is compiled.
        parameters: of the model.
        median: seconds per step.
        p90: likewise, in nine of ten steps.
        tokens_per_second: of the batch.
        peak: bytes; None where it is not measured.
        time_ratio: median against ``next``.
        memory_ratio: peak against ``next``.
    """

    way: str
    parameters: int
    median: float
    p90: float
    tokens_per_second: float
    peak: int | None
    time_ratio: float
    memory_ratio: float | None


def packed_batch(rows: int, length: int, seed: int, whole: bool = False) -> Batch:
    """Rows filled with documents of a caption and an 8x8 picture each; ``whole`` lets all of a row see each other, as one document."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for i in range(rows * length // 96):
        words = torch.randint(0, 4096, (8 + i % 16,), generator=generator)
        codes = torch.randint(0, 4096, (1, 8, 8), generator=generator)
        turns = (Turn("user", (Segment(Modality.TEXT, words, target=False),)), Turn("assistant", (Segment(Modality.IMAGE, codes),)))
        encoded = encode_document(LAYOUT, turns)
        documents.append((encoded.tokens, encoded.target_mask))
    batch = collate(documents, StreamGrammar(LAYOUT), length)
    cut: dict[str, Any] = {name: value[:rows] if isinstance(value, torch.Tensor) else value for name, value in vars(batch).items()}
    if whole:
        cut["document_ids"] = torch.zeros_like(cut["document_ids"])
    return Batch(**cut)


def step_of(model: torch.nn.Module, loss: Callable[[Batch], Any], precision: str) -> Callable[[Batch], None]:
    """One training step of a model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            total = loss(batch)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build(way: str, size: BackboneConfig, depth: int, detach: bool, anchors: float) -> tuple[torch.nn.Module, Callable[[Batch], Any]]:
    """A model and its loss."""
    torch.manual_seed(0)
    way, compiled = way.removesuffix("_compiled"), way.endswith("_compiled")
    if way == "transformers":
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=LAYOUT.size, hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_kv_heads, head_dim=size.head_dim, intermediate_size=size.mlp_width, tie_word_embeddings=True,
        )  # fmt: skip
        other = Qwen3ForCausalLM(config).train()
        call = torch.compile(other) if compiled else other
        return other, lambda batch: call(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss
    if way == "modality_specific":
        way, size = "next", replace(size, modality_specific="mlp")
    head = REGISTRY.resolve("head", way).Config(**({} if way == "next" else {"mtp_depth": depth}))
    model = UnifiedModel.Config(layout=LAYOUT, backbone=size, head=head).build().train()
    if compiled:
        model.compute_states = torch.compile(model.compute_states, dynamic=False)  # type: ignore[method-assign]
    # Every code and word is a target, as for transformers.
    loss = LossConfig(inputs=("text", "image"), detach=detach, mtp_anchors=anchors)
    return model, lambda batch: model.loss(batch, loss).total


def measure(
    ways: Sequence[str],
    size: BackboneConfig,
    depth: int,
    rows: int,
    length: int,
    rounds: int,
    precision: str,
    detach: bool,
    anchors: float = 1.0,
    whole: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Cost]:
    """Times all ways in turn."""
    batches = [packed_batch(rows, length, seed, whole) for seed in range(4)]
    tokens = int((batches[0].document_ids >= 0).sum())
    models, steps = {}, {}
    peaks: dict[str, int | None] = {}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        models[way], loss = build(way, size, depth, detach, anchors)
        steps[way] = step_of(models[way], loss, precision)
        peaks[way] = None
        if not way.endswith("_compiled"):
            with PeakMemory() as memory, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss(batches[0]).backward()
            peaks[way] = memory.peak
            models[way].zero_grad()
    for round_ in range(WARM_UP + rounds):
        for way in ways:
            began = clock()
            steps[way](batches[round_ % len(batches)])
            if round_ >= WARM_UP:
                times[way].append(clock() - began)
        print(f"\rround {round_ + 1} of {WARM_UP + rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    base, base_peak = statistics.median(times[ways[0]]), peaks[ways[0]]
    found = []
    for way in ways:
        each = sorted(times[way])
        median, peak = statistics.median(each), peaks[way]
        found.append(
            Cost(
                way=way, parameters=sum(p.numel() for p in models[way].parameters()), median=median,
                p90=each[min(len(each) - 1, int(0.9 * len(each)))], tokens_per_second=tokens / median, peak=peak,
                time_ratio=median / base, memory_ratio=peak / base_peak if peak and base_peak else None,
            )
        )  # fmt: skip
    return found


def markdown(costs: Sequence[Cost]) -> str:
    """The table."""
    lines = ["| way | parameters | step | p90 | tokens/s | peak memory | time | memory |", "|---|---|---|---|---|---|---|---|"]
    for c in costs:
        cells = (
            c.way, f"{c.parameters / 1e6:.2f} M", f"{1000 * c.median:.0f} ms", f"{1000 * c.p90:.0f} ms", f"{c.tokens_per_second:,.0f}",
            "–" if c.peak is None else f"{c.peak / 2**20:.0f} MiB", f"{c.time_ratio:.2f} ×",
            "–" if c.memory_ratio is None else f"{c.memory_ratio:.2f} ×",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and times."""
    ways = [*(name for name in REGISTRY.names("head") if name != "next"), "modality_specific", "transformers"]
    compiled = ["next_compiled", "transformers_compiled"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=[*ways, *compiled], default=ways, help="beside next; compiled ones only when named")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--mtp-depth", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--whole-rows", action="store_true", help="a row is one document")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="time of processors, not of the clock: on a busy machine, with one thread")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--joint", action="store_true", help="heads train the backbone as well")
    parser.add_argument("--anchors", type=float, default=1.0, help="share of the positions from which drafts are trained in a step")
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    costs = measure(
        ["next", *given.ways],
        SIZES[given.size],
        given.mtp_depth,
        given.rows,
        given.length,
        given.rounds,
        given.precision,
        not given.joint,
        given.anchors,
        given.whole_rows,
        time.process_time if given.cpu_time else time.perf_counter,
    )
    kind = f"{given.size}, {given.precision}{', time of processors' if given.cpu_time else ''}"
    print(f"torch {torch.__version__}, {platform.machine()}, {given.threads} threads, {kind}\n\n{markdown(costs)}")
    if given.json:
        given.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


if __name__ == "__main__":
    main()
