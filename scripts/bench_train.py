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
of compiled ways it is not measured. The table has medians, 90th percentiles and ratios to ``next``.

MFU is model FLOPs utilisation (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B): what a step has to multiply, over what the
device could in the same time. Products with weights are those that torch's FlopCounterMode counts, so logits over the few ids that a place
allows count as these alone; attention of the backbone is 12 · blocks · heads · head width FLOPs for each pair of tokens of a document, both
halves of the square as there, that of draft heads is left out. What the device could is its data sheet's in bfloat16, or what one large
product reaches; ``--peak`` gives another number. For 348 million parameters on a GPU, with FlexAttention::

    python scripts/bench_train.py --size 350m --rows 16 --length 2048 --whole-rows --attention flex --ways next_compiled
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmtp.models.backbone import BackboneConfig
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.nn.memory import PeakMemory
from mmtp.nn.peaks import Peak, peak_flops, synchronize
from mmtp.registry import REGISTRY
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import Turn, encode_document
from mmtp.testing.decoders import LAYOUT
from mmtp.testing.decoders import SIZES as DECODERS
from mmtp.types import Batch, Modality, Segment

SIZES = DECODERS | {"medium": BackboneConfig(width=512, depth=12, num_heads=8, num_kv_heads=4, head_dim=64, mlp_width=1408)}
"""Those of decoding; medium is twice as large here."""
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
        flops: of a step.
        mfu: of the device's peak, the share that they are in a median step.
    """

    way: str
    parameters: int
    median: float
    p90: float
    tokens_per_second: float
    peak: int | None
    time_ratio: float
    memory_ratio: float | None
    flops: float
    mfu: float


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How all ways train.

    Attributes:
        size: of the backbone.
        depth: further tokens.
        rows: of a batch.
        length: tokens of a row.
        precision: ``float32`` or ``bfloat16``.
        detach: whether heads leave the backbone alone.
        anchors: share of the positions from which drafts are trained.
        whole: whether a row is one document.
        device: what trains.
        attention: ``sdpa`` or ``flex``, of our ways.
    """

    size: BackboneConfig
    depth: int = 3
    rows: int = 4
    length: int = 512
    precision: str = "bfloat16"
    detach: bool = True
    anchors: float = 1.0
    whole: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    attention: str = "sdpa"

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


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


def step_of(model: torch.nn.Module, loss: Callable[[Batch], Any], setting: Setting) -> Callable[[Batch], None]:
    """One training step of a model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        with setting.autocast():
            total = loss(batch)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build(way: str, setting: Setting) -> tuple[torch.nn.Module, Callable[[Batch], Any]]:
    """A model and its loss, not compiled."""
    torch.manual_seed(0)
    way, size = way.removesuffix("_compiled"), setting.size
    if way == "transformers":
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=LAYOUT.size, hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_kv_heads, head_dim=size.head_dim, intermediate_size=size.mlp_width, tie_word_embeddings=True,
        )  # fmt: skip
        other: Any = Qwen3ForCausalLM(config).train()
        other = other.to(setting.device)
        return other, lambda batch: other(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss
    if way == "modality_specific":
        way, size = "next", replace(size, modality_specific="mlp")
    head = REGISTRY.resolve("head", way).Config(**({} if way == "next" else {"mtp_depth": setting.depth}))
    model = UnifiedModel.Config(layout=LAYOUT, backbone=size, head=head).build().train().to(setting.device)
    model.flex_attention = setting.attention == "flex"
    # Every code and word is a target, as for transformers.
    loss = LossConfig(inputs=("text", "image"), detach=setting.detach, mtp_anchors=setting.anchors)
    return model, lambda batch: model.loss(batch, loss).total


def compile_forward(model: torch.nn.Module) -> None:
    """Lets the forward pass of a model go through torch.compile."""
    if isinstance(model, UnifiedModel):
        model.compute_states = torch.compile(model.compute_states, dynamic=False)  # type: ignore[method-assign]
    else:
        model.compile()


def attention_flops(size: BackboneConfig, document_ids: torch.Tensor) -> float:
    """FLOPs of a step in the backbone's attention, forward and backward."""
    pairs = sum(int(row[row >= 0].bincount().square().sum()) for row in document_ids.cpu())
    return 12.0 * size.depth * size.num_heads * size.head_dim * pairs


def product_flops(model: torch.nn.Module, loss: Callable[[Batch], Any], batch: Batch, setting: Setting) -> float:
    """FLOPs of a step in products with weights, forward and backward."""
    if isinstance(model, UnifiedModel):
        model.flex_attention = False  # it is compiled, where operations are not counted one by one; products are the same
    aten = torch.ops.aten
    with FlopCounterMode(display=False) as counter:
        run_pass(model, loss, batch, setting)
    if isinstance(model, UnifiedModel):
        model.flex_attention = setting.attention == "flex"
    counts = counter.get_flop_counts()["Global"]
    return float(sum(counts.get(product, 0) for product in (aten.mm, aten.addmm)))


def peak_memory(model: torch.nn.Module, loss: Callable[[Batch], Any], batch: Batch, setting: Setting) -> int:
    """Bytes that tensors made by forward and backward pass hold at most."""
    if setting.device.type == "cpu":
        with PeakMemory() as memory:
            run_pass(model, loss, batch, setting)
        return memory.peak
    run_pass(model, loss, batch, setting)  # what kernels keep for later is made once
    torch.cuda.reset_peak_memory_stats(setting.device)
    before = torch.cuda.memory_allocated(setting.device)
    run_pass(model, loss, batch, setting)
    return torch.cuda.max_memory_allocated(setting.device) - before


def run_pass(model: torch.nn.Module, loss: Callable[[Batch], Any], batch: Batch, setting: Setting) -> None:
    """Forward and backward, of which nothing stays."""
    with setting.autocast():
        total = loss(batch)
    total.backward()
    model.zero_grad()


def measure(ways: Sequence[str], setting: Setting, rounds: int, peak: float, clock: Callable[[], float] = time.perf_counter) -> list[Cost]:
    """Times all ways in turn; ``peak`` is what the device could, in FLOPs per second."""
    batches = [packed_batch(setting.rows, setting.length, seed, setting.whole).to(setting.device) for seed in range(4)]
    tokens = int((batches[0].document_ids >= 0).sum())
    models, steps = {}, {}
    peaks: dict[str, int | None] = {}
    flops: dict[str, float] = {}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        models[way], loss = build(way, setting)
        steps[way] = step_of(models[way], loss, setting)
        flops[way] = product_flops(models[way], loss, batches[0], setting) + attention_flops(setting.size, batches[0].document_ids)
        peaks[way] = None
        if way.endswith("_compiled"):
            compile_forward(models[way])
        else:
            peaks[way] = peak_memory(models[way], loss, batches[0], setting)
    for round_ in range(WARM_UP + rounds):
        for way in ways:
            synchronize(setting.device)
            began = clock()
            steps[way](batches[round_ % len(batches)])
            synchronize(setting.device)
            if round_ >= WARM_UP:
                times[way].append(clock() - began)
        print(f"\rround {round_ + 1} of {WARM_UP + rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    base, base_peak = statistics.median(times[ways[0]]), peaks[ways[0]]
    found = []
    for way in ways:
        each = sorted(times[way])
        median, most = statistics.median(each), peaks[way]
        found.append(
            Cost(
                way=way, parameters=sum(p.numel() for p in models[way].parameters()), median=median,
                p90=each[min(len(each) - 1, int(0.9 * len(each)))], tokens_per_second=tokens / median, peak=most,
                time_ratio=median / base, memory_ratio=most / base_peak if most and base_peak else None,
                flops=flops[way], mfu=flops[way] / median / peak,
            )
        )  # fmt: skip
    return found


def markdown(costs: Sequence[Cost]) -> str:
    """The table."""
    lines = ["| way | parameters | step | p90 | tokens/s | peak memory | time | memory | MFU |", "|---|---|---|---|---|---|---|---|---|"]
    for c in costs:
        cells = (
            c.way, f"{c.parameters / 1e6:.2f} M", f"{1000 * c.median:.0f} ms", f"{1000 * c.p90:.0f} ms", f"{c.tokens_per_second:,.0f}",
            "–" if c.peak is None else f"{c.peak / 2**20:.0f} MiB", f"{c.time_ratio:.2f} ×",
            "–" if c.memory_ratio is None else f"{c.memory_ratio:.2f} ×",
            f"{100 * c.mfu:.0f} %",
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", choices=["sdpa", "flex"], default="sdpa", help="of our ways; flex on accelerators alone")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device in this precision, in place of what is known or measured")
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if given.attention == "flex" and device.type == "cpu":
        parser.error("--attention flex: FlexAttention has no backward pass on a CPU; leave it out")
    if given.cpu_time and device.type != "cpu":
        parser.error("--cpu-time: the processors' time says nothing of an accelerator; leave it out")
    torch.set_num_threads(given.threads)
    setting = Setting(
        size=SIZES[given.size], depth=given.mtp_depth, rows=given.rows, length=given.length, precision=given.precision,
        detach=not given.joint, anchors=given.anchors, whole=given.whole_rows, device=device, attention=given.attention,
    )  # fmt: skip
    peak = Peak(given.peak * 1e12, "as given") if given.peak else peak_flops(device, getattr(torch, given.precision))
    costs = measure(["next", *given.ways], setting, given.rounds, peak.rate, time.process_time if given.cpu_time else time.perf_counter)
    kind = f"{given.size}, {given.precision}{', time of processors' if given.cpu_time else ''}"
    machine = f"{platform.machine()}, {given.threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {machine}, {kind}\n\n{markdown(costs)}")
    print(f"\nMFU is of {peak.rate / 1e12:,.3g} TFLOP/s ({peak.source})")
    if given.json:
        given.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


if __name__ == "__main__":
    main()
