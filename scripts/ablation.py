"""Draft heads side by side on one frozen model.

``python scripts/ablation.py models/emoji-s --train runs/emoji-draw --held-out runs/emoji-held --out runs/ablation-emoji``

What heads differ in is all that differs: they learn from the same states of the same frozen backbone, on the same batches in the same
order, by the same optimizer and for as many steps, and have as many parameters as ``sequential`` has (its D blocks against one wider
block, by ``mlp_width``; those called thin keep the backbone's width). A seed decides the batches and the heads' first weights. Of models
that read vectors, heads that read a placeholder in place of them (the default), the vectors, or nothing are compared as well.

Measured on held-out documents, per modality and offset: the overlap 1 - TV of draft and model behind the documents' own prefixes, which
is what rejection sampling accepts at temperature 1 (Leviathan et al., arXiv 2211.17192, theorem 3.5); and decoding by the engine from the
documents' prompts at temperature 1: drafts accepted, tokens per pass, and whether the output equals plain decoding's bit for bit.

OUT receives ``results.jsonl``, a line per variant and seed; what stands there is not measured again. ``--report FOLDER`` writes tables
(``ablation-NAME.md``) and plots of all seeds, NAME being that of OUT.
"""

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from mmtp.config import from_dict
from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling
from mmtp.eval.decoding import Prompt, held_out_prompts
from mmtp.eval.report import Figure, bars
from mmtp.hub import from_pretrained
from mmtp.models.heads.base import offset_name, vertical
from mmtp.models.loss import LossConfig, LossOutput, unified_loss
from mmtp.models.unified import UnifiedModel, input_spans
from mmtp.nn.attention import document_mask
from mmtp.registry import REGISTRY
from mmtp.train.precision import quicker_precision
from mmtp.train.trainer import OptimConfig, build_optimizers
from mmtp.types import Batch

OPTIM = OptimConfig(lr=2e-3, muon_lr=5e-3, weight_decay=0.05, warmup=20)
LOSS = {"mtp_weight": 1.0, "mtp_decay": 0.9}


@dataclass(frozen=True)
class Variant:
    """A head, and what of the loss differs for it.

    Attributes:
        name: in tables.
        head: its configuration, less ``mtp_depth``.
        loss: keys of ``[loss]``.
        thin: the blocks are as wide as the backbone's, however many there are.
    """

    name: str
    head: dict[str, Any]
    loss: dict[str, Any] = field(default_factory=dict)
    thin: bool = False


VARIANTS = (
    Variant("parallel", {"type": "parallel"}),
    Variant("sequential", {"type": "sequential"}),
    Variant("shared", {"type": "shared"}),
    Variant("synchronized", {"type": "synchronized"}),
    Variant("synchronized, gates closed", {"type": "synchronized", "exchange": "none"}),
    Variant("synchronized, one softmax", {"type": "synchronized", "exchange": "common"}),
    Variant("synchronized, rows", {"type": "synchronized", "vertical": 8}),
    Variant("synchronized, an eighth of the anchors", {"type": "synchronized"}, {"mtp_anchors": 0.125}),
    Variant("synchronized, distilled", {"type": "synchronized"}, {"mtp_distill": 1.0}),
    Variant("sequential, distilled", {"type": "sequential"}, {"mtp_distill": 1.0}),
    Variant("synchronized, vectors as they are", {"type": "synchronized", "continuous": "embeddings"}),
    Variant("synchronized, vectors masked", {"type": "synchronized", "continuous": "masked"}),
    Variant("sequential, vectors as they are", {"type": "sequential", "continuous": "embeddings"}),
    Variant("sequential, vectors masked", {"type": "sequential", "continuous": "masked"}),
    Variant("shared, thin", {"type": "shared"}, thin=True),
    Variant("synchronized, thin", {"type": "synchronized"}, thin=True),
)


def build_head(variant: Variant, model: UnifiedModel, depth: int) -> nn.Module:
    """The untrained head of a variant, with the parameters of ``sequential`` unless it is thin."""

    def build(head: dict[str, Any]) -> nn.Module:
        values = {key: value for key, value in head.items() if key != "type"}
        config = REGISTRY.resolve("head", head["type"]).Config(mtp_depth=depth, **values)
        return config.build(backbone=model.config.backbone, modalities=model.config.layout.modalities)

    if variant.thin:
        return build(variant.head)
    wanted = parameters(build({"type": "sequential"}))
    some, more = (parameters(build(variant.head | {"mlp_width": width})) for width in (32, 64))
    width = 32 * max(1, 1 + round((wanted - some) / (more - some)))
    return build(variant.head | {"mlp_width": width})


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def frozen_states(model: UnifiedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The backbone's states of a batch, and what it reads."""
    embedded = model.embedding.batch(batch)
    mask = document_mask(batch.document_ids, input_spans(batch, model.config.layout))
    return model.backbone(embedded, batch.positions, mask, routes=model.backbone.routes(model.slot_modality[batch.slots])), embedded


def head_loss(model: UnifiedModel, head: Any, batch: Batch, states: tuple[torch.Tensor, torch.Tensor], loss: LossConfig) -> LossOutput:
    """Loss of a head on frozen states."""
    hidden, embedded = states
    anchors = loss.draw_anchors(batch)
    with torch.no_grad():
        own = model.backbone.norm(hidden)
    read, places = model.draft_inputs(head, batch, embedded, document_mask(batch.document_ids))
    drafted = [own, *head(hidden, read, places, anchors)]
    return unified_loss(drafted, model.unembedding.weight.detach(), batch, model.config.layout, loss, bool(vertical(head)), anchors)


def train(
    model: UnifiedModel, variants: Sequence[Variant], batches: PackedBatches, depth: int, steps: int, seed: int, anchors: float
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Heads of all variants, trained side by side, and the median seconds of a step of each."""
    half = quicker_precision() == "bfloat16"
    heads, optimizers, seconds = {}, {}, {variant.name: [] for variant in variants}
    for variant in variants:
        torch.manual_seed(seed)
        heads[variant.name] = build_head(variant, model, depth).train()
        optimizers[variant.name] = build_optimizers(heads[variant.name], OPTIM)
    losses = {variant.name: from_dict(LossConfig, LOSS | {"mtp_anchors": anchors} | variant.loss, "loss") for variant in variants}
    for step in track(range(steps), f"seed {seed}: training {len(variants)} heads"):
        rate = min((step + 1) / OPTIM.warmup, 0.5 + 0.5 * math.cos(math.pi * max(0.0, step / steps - OPTIM.flat) / (1 - OPTIM.flat)))
        batch = batches.batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            states = frozen_states(model, batch)
            for name, head in heads.items():
                begun = time.perf_counter()
                head_loss(model, head, batch, states, losses[name]).total.backward()
                nn.utils.clip_grad_norm_(head.parameters(), OPTIM.clip)
                for optimizer in optimizers[name]:
                    for group in optimizer.param_groups:
                        group["lr"] = rate * (OPTIM.muon_lr if isinstance(optimizer, torch.optim.Muon) else OPTIM.lr)
                    optimizer.step()
                    optimizer.zero_grad()
                seconds[name].append(time.perf_counter() - begun)
    return heads, {name: statistics.median(times) for name, times in seconds.items()}


@torch.no_grad()
def overlaps(model: UnifiedModel, heads: dict[str, nn.Module], batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
    """Mean 1 - TV between each head's drafts and the model by modality and offset, in float32."""
    shared, counts = ({name: Counter() for name in heads} for _ in range(2))
    for batch in batches:
        states = frozen_states(model, batch)
        for name, head in heads.items():
            found = head_loss(model, head, batch, states, LossConfig(mtp_distill=1.0))
            shared[name].update(found.overlap)
            counts[name].update({key: found.counts[key] for key in found.overlap})
    return {
        name: {
            f"{modality}{offset_name(offset)}": total / counts[name][modality, offset] for (modality, offset), total in sorted(some.items())
        }
        for name, some in shared.items()
    }


def decode(model: UnifiedModel, prompts: dict[str, list[Prompt]], speculative: bool, limit: int) -> dict[str, Any]:
    """Generations by task, at temperature 1 with seeds 0, 1, 2, …"""
    engine, found = Engine(model, exact=True), {}
    for task, some in prompts.items():
        samplings = [Sampling(seed=seed) for seed in range(len(some))]
        with torch.no_grad():
            vectors = [None if p.features is None else model.embedding.connect(p.features, p.feature_grids) for p in some]
        found[task] = engine.generate_batch([prompt.tokens for prompt in some], samplings, limit, speculative, vectors=vectors)
    return found


def decoded(generations: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Tokens per pass, share of drafts accepted by modality and offset, and how many outputs equal those of plain decoding."""
    found = {}
    for task, rows in generations.items():
        drafted, accepted = (
            sum((getattr(row.stats, name) for row in rows), start=type(rows[0].stats.drafted)()) for name in ("drafted", "accepted")
        )
        found[task] = {
            "tokens_per_pass": sum(row.stats.generated for row in rows) / sum(row.stats.passes for row in rows),
            "accepted": {f"{m}{offset_name(k)}": accepted[m, k] / n for (m, k), n in sorted(drafted.items())},
            "equal": [sum(a.tokens == b.tokens for a, b in zip(rows, plain[task], strict=True)), len(rows)],
        }
    return found


def report(folder: Path, name: str, records: Sequence[dict[str, Any]]) -> None:
    """Tables and plots over all seeds."""
    variants = list(dict.fromkeys(record["variant"] for record in records))
    of = {variant: [record for record in records if record["variant"] == variant] for variant in variants}
    tasks = list(records[0]["tasks"])
    keys = sorted({key for record in records for key in record["overlap"]})
    base = {record["seed"]: record["seconds"] for record in of.get("sequential", [])}

    def spread(values: list[float], digits: int = 3) -> str:
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}" if values else "–"

    head = ["head", "parameters", *(f"tokens / pass, {task}" for task in tasks), "step", "equal"]
    lines = [head, ["---"] * len(head)]
    for variant in variants:
        some = of[variant]
        ratios = [record["seconds"] / base[record["seed"]] for record in some if record["seed"] in base]
        equal = [sum(record["tasks"][task]["equal"][i] for record in some for task in tasks) for i in (0, 1)]
        per_pass = [spread([record["tasks"][task]["tokens_per_pass"] for record in some], 2) for task in tasks]
        step = f"{statistics.mean(ratios):.2f} ×" if ratios else "–"
        lines.append([variant, f"{some[0]['parameters'] / 1e6:.2f} M", *per_pass, step, f"{equal[0]} of {equal[1]}"])
    overlap = [["head", *keys], ["---"] * (1 + len(keys))]
    for variant in variants:
        shares = [[record["overlap"][key] for record in of[variant] if key in record["overlap"]] for key in keys]
        overlap.append([variant, *(spread(values) for values in shares)])
    tables = ["\n".join("| " + " | ".join(row) + " |" for row in table) for table in (lines, overlap)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"ablation-{name}.md").write_text("\n\n".join(tables) + "\n")
    for modality in dict.fromkeys(key.split("+")[0] for key in keys if "+" in key):
        offsets = [key for key in keys if key.startswith(f"{modality}+")]
        series = {v: [statistics.mean(record["overlap"][key] for record in of[v]) for key in offsets] for v in variants}
        write_figure(folder / f"ablation-{name}-{modality}.svg", bars(offsets, series, "overlap of draft and model (1 − TV)"))
    series = {
        variant: [statistics.mean(r["tasks"][task]["tokens_per_pass"] for r in of[variant]) for task in tasks] for variant in variants
    }
    write_figure(folder / f"ablation-{name}-tokens.svg", bars(tasks, series, "tokens per pass"))


def write_figure(path: Path, figure: Figure) -> None:
    path.write_text(figure.svg)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, trains, measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a trained model; its own head is not looked at")
    parser.add_argument("--train", nargs="+", type=Path, required=True, help="data sets of mmtp tokenize")
    parser.add_argument("--held-out", nargs="+", type=Path, required=True, help="data sets that nothing was trained on")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--report", type=Path, help="folder for tables and plots")
    parser.add_argument("--mtp-depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--budget", type=int, default=512, help="tokens per row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8, help="held-out batches of so many rows behind which drafts are compared")
    parser.add_argument("--prompts", type=int, default=16, help="of each task")
    parser.add_argument("--limit", type=int, default=512, help="new tokens of a prompt")
    parser.add_argument("--anchors", type=float, default=1.0, help="share of the positions from which a step trains drafts")
    parser.add_argument("--variants", nargs="+", choices=[v.name for v in VARIANTS], metavar="NAME", help="without it all")
    args = parser.parse_args(arguments)
    model = from_pretrained(args.model).eval().requires_grad_(False)
    able = [v for v in VARIANTS if model.config.feature_width or "continuous" not in v.head]
    chosen = [v for v in able if not args.variants or v.name in args.variants]
    trained, held_out = ([ShardDataset(path).over(model.config.layout) for path in paths] for paths in (args.train, args.held_out))
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    measured = PackedBatches(held_out, rows=args.rows, budget=args.budget)
    prompts: dict[str, list[Prompt]] = {}
    for prompt in held_out_prompts(held_out, args.prompts):
        prompts.setdefault(prompt.kind, []).append(prompt)
    plain: dict[str, Any] = {}
    for seed in range(args.seeds):
        missing = [v for v in chosen if not any((r["variant"], r["seed"]) == (v.name, seed) for r in records)]
        if not missing:
            continue
        plain = plain or decode(model, prompts, False, args.limit)
        batches = PackedBatches(trained, rows=args.rows, budget=args.budget, seed=seed)
        heads, seconds = train(model, missing, batches, args.mtp_depth, args.steps, seed, args.anchors)
        shares = overlaps(model, heads, map(measured.batch, range(min(args.batches, measured.steps_per_epoch))))
        for variant in track(missing, f"seed {seed}: decoding"):
            model.head = heads[variant.name].eval()
            record = {
                "variant": variant.name,
                "seed": seed,
                "steps": args.steps,
                "anchors": args.anchors,
                "parameters": parameters(model.head),
                "seconds": seconds[variant.name],
                "overlap": shares[variant.name],
                "tasks": decoded(decode(model, prompts, True, args.limit), plain),
            }
            records.append(record)
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
    if args.report is not None:
        report(args.report, args.out.name.removeprefix("ablation-"), [r for r in records if r["variant"] in {v.name for v in chosen}])


if __name__ == "__main__":
    main()
