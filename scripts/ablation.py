"""Draft heads side by side on one model.

``python scripts/ablation.py models/emoji-s --train runs/emoji-draw runs/emoji-caption --held-out runs/emoji-val --compile``

What heads differ in is all that differs: they learn from the same batches in the same order, by the same optimizer and for as many steps,
and have as many parameters as ``sequential`` has (its D blocks against one wider block, by ``mlp_width``; those called thin keep the
backbone's width). A seed decides the batches, the anchors and the heads' first weights. Of models that read vectors, heads that read a
placeholder in place of them (the default), the vectors, or nothing are compared as well.

The backbone is frozen, and its states are computed once for all heads. Variants called detached and joint go on to train a copy of the
whole model each, on the data's loss and the drafts'; only of the joint ones do the drafts' gradients reach the backbone. They cost several
times as much, and run if they are named.

Measured on held-out documents, per modality and offset (``below`` is the code one row below): cross-entropy; the overlap 1 - TV of draft
and model behind the documents' own prefixes, which is what rejection sampling accepts at temperature 1 (Leviathan et al., arXiv
2211.17192, theorem 3.5); and decoding by the engine from the documents' prompts at temperature 1, by task: drafts accepted, tokens per
pass, and whether the output equals plain decoding's bit for bit. A training step's cost is time of cores, in whatever company it ran; that
of the frozen states is not in it.

OUT receives ``results.jsonl``, a line per variant and seed, and the trained weights in ``trained/``; what stands there is neither trained
nor measured again. Tables of all seeds are printed, means and standard deviations; ``--plot FILE.png`` draws them.
"""

import argparse
import copy
import difflib
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mmtp.config import from_dict
from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling
from mmtp.eval.decoding import Prompt, held_out_prompts
from mmtp.hub import from_pretrained
from mmtp.models.heads.base import offset_name, vertical
from mmtp.models.loss import LossConfig, LossOutput, unified_loss
from mmtp.models.unified import UnifiedModel, input_spans
from mmtp.nn.attention import document_mask
from mmtp.nn.windows import Windows
from mmtp.registry import REGISTRY
from mmtp.train.precision import quicker_precision
from mmtp.train.trainer import OptimConfig, build_optimizers
from mmtp.types import Batch

OPTIM = OptimConfig(lr=2e-3, muon_lr=5e-3, weight_decay=0.05, warmup=20)
GOES_ON = replace(OPTIM, lr=OPTIM.lr / 20, muon_lr=OPTIM.muon_lr / 20)
"""Of a backbone that trains further: at the rates of a new head it would forget, within these few steps, more than it learns."""
LOSS = {"mtp_weight": 1.0, "mtp_decay": 0.9}
STDERR = Console(stderr=True)  # progress; tables alone go to stdout
SETTINGS = ("mtp_depth", "steps", "rows", "budget", "anchors", "batches", "prompts", "limit")  # of which all results of a folder are


@dataclass(frozen=True)
class Variant:
    """A head, and what of the loss differs for it.

    Attributes:
        name: in tables.
        head: its configuration, less ``mtp_depth``.
        loss: keys of ``[loss]``.
        thin: the blocks are as wide as the backbone's, however many there are.
        backbone: stays as it is, or trains as well, with or without the gradients of drafts.
    """

    name: str
    head: dict[str, Any]
    loss: dict[str, Any] = field(default_factory=dict)
    thin: bool = False
    backbone: Literal["frozen", "detached", "joint"] = "frozen"


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
    Variant("sequential, detached", {"type": "sequential"}, backbone="detached"),
    Variant("sequential, joint", {"type": "sequential"}, backbone="joint"),
    Variant("synchronized, detached", {"type": "synchronized"}, backbone="detached"),
    Variant("synchronized, joint", {"type": "synchronized"}, backbone="joint"),
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
    spans = input_spans(batch, model.config.layout)
    window = model.config.backbone.window
    mask = Windows.of(batch.document_ids, spans, window=window) or document_mask(batch.document_ids, spans, window=window)
    return model.backbone(embedded, batch.positions, mask, routes=model.backbone.routes(model.slot_modality[batch.slots])), embedded


class Learner:
    """A variant in training: a head on the frozen model that all share, or on a copy that trains as well.

    Args:
        variant: says which.
        model: trained, its own head is not looked at.
        depth: ``mtp_depth``.
        seed: of the head's first weights.
        anchors: share of the positions from which drafts are trained.
    """

    def __init__(self, variant: Variant, model: UnifiedModel, depth: int, seed: int, anchors: float) -> None:
        self.variant, self.shares = variant, variant.backbone == "frozen"
        self.loss = from_dict(LossConfig, LOSS | {"mtp_anchors": anchors, "detach": variant.backbone != "joint"} | variant.loss, "loss")
        torch.manual_seed(seed)
        self.head: Any = build_head(variant, model, depth)
        self.model = model
        if not self.shares:
            self.model = copy.deepcopy(model).requires_grad_(True)
            self.model.head = self.head
        self.module = self.head if self.shares else self.model
        self.optimizers = build_optimizers(self.head, OPTIM)
        if not self.shares:
            rest = {name: child for name, child in self.model.named_children() if child is not self.head}
            self.optimizers += build_optimizers(nn.ModuleDict(rest), GOES_ON)
        self.seconds: list[float] = []

    def step(self, batch: Batch, states: tuple[torch.Tensor, torch.Tensor] | None, rate: float) -> None:
        """One step of the optimizer."""
        begun = time.process_time()
        self.cost(batch, states, self.loss).total.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), OPTIM.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * optimizer.defaults["lr"]
            optimizer.step()
            optimizer.zero_grad()
        self.seconds.append(time.process_time() - begun)

    def cost(self, batch: Batch, states: tuple[torch.Tensor, torch.Tensor] | None, loss: LossConfig) -> LossOutput:
        """Loss of a batch.

        Args:
            batch: packed rows.
            states: of the frozen model; read by heads that share it.
            loss: weights.
        """
        if not self.shares or states is None:
            return self.model.loss(batch, loss)
        hidden, embedded = states
        anchors = loss.draw_anchors(batch)
        with torch.no_grad():
            own = self.model.backbone.norm(hidden)
        read, places = self.model.draft_inputs(
            self.head, batch, embedded, document_mask(batch.document_ids, window=self.model.config.backbone.window)
        )
        drafted = [own, *self.head(hidden, read, places, anchors)]
        weight = self.model.unembedding.weight.detach()
        return unified_loss(drafted, weight, batch, self.model.config.layout, loss, bool(vertical(self.head)), anchors)

    def keep(self, path: Path) -> None:
        """Writes what was trained."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().clone().contiguous() for name, value in self.module.state_dict().items()}
        save_file(state, path, {"seconds": str(statistics.median(self.seconds))})

    def resume(self, path: Path) -> None:
        """Takes what :meth:`keep` has written."""
        with safe_open(path, "pt") as file:
            self.module.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            self.seconds = [float(file.metadata()["seconds"])]


def train(learners: Sequence[Learner], model: UnifiedModel, batches: PackedBatches, steps: int, seed: int) -> None:
    """Trains all variants side by side."""
    half = quicker_precision() == "bfloat16"
    for learner in learners:
        learner.module.train()
    for step in track(range(steps), f"seed {seed}: training {len(learners)} heads", console=STDERR):
        rate = min((step + 1) / OPTIM.warmup, 0.5 + 0.5 * math.cos(math.pi * max(0.0, step / steps - OPTIM.flat) / (1 - OPTIM.flat)))
        batch = batches.batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            states = frozen_states(model, batch) if any(learner.shares for learner in learners) else None
            for learner in learners:
                torch.manual_seed((seed << 32) + step)  # the same anchors for all
                learner.step(batch, states, rate)


@torch.no_grad()
def held_out(learners: Sequence[Learner], model: UnifiedModel, batches: Iterable[Batch]) -> list[dict[str, dict[str, float]]]:
    """Of each learner the mean cross-entropy in nats, and the mean 1 - TV between drafts and model, by modality and offset; in float32."""
    sums, shared, counts = ([Counter() for _ in learners] for _ in range(3))
    for batch in batches:
        states = frozen_states(model, batch)
        for i, learner in enumerate(learners):
            found = learner.cost(batch, states, LossConfig(mtp_distill=1.0))
            for total, more in ((sums, found.sums), (shared, found.overlap), (counts, found.counts)):
                total[i].update(more)
    return [
        {
            name: {f"{m}{offset_name(k) if k else ''}": total / counts[i][m, k] for (m, k), total in sorted(totals[i].items())}
            for name, totals in (("loss", sums), ("overlap", shared))
        }
        for i in range(len(learners))
    ]


def decode(model: UnifiedModel, prompts: dict[str, list[Prompt]], speculative: bool, limit: int, compiled: bool) -> dict[str, Any]:
    """Generations by task, at temperature 1 with seeds 0, 1, 2, …"""
    engine, found = Engine(model, exact=True, draft_cost=0, drafts=HeadDrafts(), compile=compiled), {}
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


def tables(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: what each variant costs and brings, then its drafts by modality and offset."""
    variants = list(dict.fromkeys(record["variant"] for record in records))
    tasks = list(records[0]["tasks"])
    base = {record["seed"]: record["seconds"] for record in records if record["variant"] == "sequential"}

    def table(title: str, columns: Sequence[str], cell: Callable[[dict[str, Any], str], float | None], digits: int = 3) -> str:
        rows = [[title, *columns], ["---"] * (1 + len(columns))]
        for variant in variants:
            of = [record for record in records if record["variant"] == variant]
            values = [[v for record in of if (v := cell(record, column)) is not None] for column in columns]
            rows.append([variant, *(spread(some, digits) for some in values)])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def keys(found: Callable[[dict[str, Any]], dict[str, float]]) -> list[str]:
        return sorted({key for record in records for key in found(record)})

    def summary(record: dict[str, Any], column: str) -> float | None:
        if column == "M parameters":
            return record["parameters"] / 1e6
        if column == "core-seconds of a step":
            return record["seconds"]
        if column == "steps of sequential":
            return record["seconds"] / base[record["seed"]] if record["seed"] in base else None
        if column == "outputs equal":
            return sum(found["equal"][0] for found in record["tasks"].values()) / sum(
                found["equal"][1] for found in record["tasks"].values()
            )
        return record["tasks"][column.removeprefix("tokens per pass, ")]["tokens_per_pass"]

    passes = [f"tokens per pass, {task}" for task in tasks]
    yield table("head", ["M parameters", *passes, "core-seconds of a step", "steps of sequential", "outputs equal"], summary, 2)
    for task in tasks:
        columns = keys(lambda record, task=task: record["tasks"][task]["accepted"])
        yield table(f"drafts accepted, {task}", columns, lambda record, key, task=task: record["tasks"][task]["accepted"].get(key))
    for name, title in (("overlap", "overlap of draft and model"), ("loss", "cross-entropy, nats")):
        yield table(
            title, keys(lambda record, name=name: record.get(name, {})), lambda record, key, name=name: record.get(name, {}).get(key)
        )


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, as text."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def plot(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Overlaps by offset, a panel per modality, and tokens per pass by task; bars end at the mean, lines span the seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    variants = list(dict.fromkeys(record["variant"] for record in records))
    keys = sorted({key for record in records for key in record["overlap"]})
    panels = {}
    for modality in dict.fromkeys(key.split("+")[0] for key in keys if "+" in key):
        offsets = [key for key in keys if key.removeprefix(modality)[:1] == "+" or key == f"{modality}below"]
        panels[f"1 − TV of draft and model, {modality}"] = {key.removeprefix(modality): ("overlap", key) for key in offsets}
    panels["tokens per pass"] = {task: ("tasks", task) for task in records[0]["tasks"]}
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    width, colours = 0.8 / len(variants), colormaps["tab10" if len(variants) <= 10 else "tab20"]
    for axes, (title, groups) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, variant in enumerate(variants):
            of = [record for record in records if record["variant"] == variant]
            for g, (part, key) in enumerate(groups.values()):
                values = [
                    record[part][key] if part == "overlap" else record[part][key]["tokens_per_pass"] for record in of if key in record[part]
                ]
                if values:
                    place = g + (i - (len(variants) - 1) / 2) * width
                    axes.bar(place, statistics.mean(values), 0.92 * width, color=colours(i), label=variant if g == 0 else None)
                    axes.vlines(place, min(values), max(values), color="black", linewidth=0.8)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(variants)), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144, metadata={"Software": None})


def variant_names(given: Sequence[str] | None, able: Sequence[Variant]) -> list[Variant]:
    """The variants of these names, in their order; all on the frozen model where none are given.

    Raises:
        ValueError: there is no such variant; names the nearest.
    """
    known = {variant.name: variant for variant in able}
    for name in given or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.3)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, known))}"
            raise ValueError(f"--variants: there is no {name!r}; {hint}")
    return [known[name] for name in given] if given else [variant for variant in able if variant.backbone == "frozen"]


def read_results(path: Path, settings: dict[str, float]) -> list[dict[str, Any]]:
    """What was measured before.

    Raises:
        ValueError: by other settings.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for record in records:
        for name, wanted in settings.items():
            if record.get(name, wanted) != wanted:
                option = name.replace("_", "-")
                raise ValueError(f"{path}: results with --{option} {record[name]:g}, and {wanted:g} is wanted; give another --out")
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, trains, measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a trained model; its own head is not looked at")
    parser.add_argument("--train", nargs="+", type=Path, required=True, help="data sets of mmtp tokenize")
    parser.add_argument("--held-out", nargs="+", type=Path, required=True, help="data sets that nothing was trained on")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--plot", type=Path, help="PNG of the results")
    parser.add_argument("--mtp-depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--budget", type=int, default=512, help="tokens per row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--anchors", type=float, default=1.0, help="share of the positions from which a step trains drafts")
    parser.add_argument("--batches", type=int, default=8, help="held-out batches of so many rows behind which drafts are compared")
    parser.add_argument("--prompts", type=int, default=16, help="of each task")
    parser.add_argument("--limit", type=int, default=512, help="new tokens of a prompt")
    parser.add_argument("--compile", action="store_true", help="decode by compiled kernels (see mmtp generate --compile)")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="without it all on the frozen model: " + "; ".join(v.name for v in VARIANTS)
    )
    args = parser.parse_args(arguments)
    model = from_pretrained(args.model).eval().requires_grad_(False)
    settings, results = {name: getattr(args, name) for name in SETTINGS}, args.out / "results.jsonl"
    try:
        chosen = variant_names(args.variants, [v for v in VARIANTS if model.config.feature_width or "continuous" not in v.head])
        records = read_results(results, settings)
    except ValueError as error:
        parser.error(str(error))
    if model.config.backbone.cross_attention_every or model.config.next_scale:
        parser.error(f"{args.model}: heads are not compared on models with cross-attention, or that write by scales")
    trained, measured = ([ShardDataset(path).over(model.config.layout) for path in paths] for paths in (args.train, args.held_out))
    args.out.mkdir(parents=True, exist_ok=True)
    held_out_batches = PackedBatches(measured, rows=args.rows, budget=args.budget)
    prompts: dict[str, list[Prompt]] = {}
    for prompt in held_out_prompts(measured, args.prompts):
        prompts.setdefault(prompt.kind, []).append(prompt)
    plain: dict[str, Any] = {}
    for seed in range(args.seeds):
        missing = [v for v in chosen if not any((r["variant"], r["seed"]) == (v.name, seed) for r in records)]
        if not missing:
            continue
        learners = {
            args.out / "trained" / f"{v.name}-{seed}.safetensors": Learner(v, model, args.mtp_depth, seed, args.anchors) for v in missing
        }
        if untrained := {path: learner for path, learner in learners.items() if not path.exists()}:
            batches = PackedBatches(trained, rows=args.rows, budget=args.budget, seed=seed)
            train(list(untrained.values()), model, batches, args.steps, seed)
        for path, learner in learners.items():
            if path in untrained:
                learner.keep(path)
            else:
                learner.resume(path)
            learner.module.eval()
        found = held_out(
            list(learners.values()), model, map(held_out_batches.batch, range(min(args.batches, held_out_batches.steps_per_epoch)))
        )
        for learner, numbers in zip(track(learners.values(), f"seed {seed}: decoding", console=STDERR), found, strict=True):
            learner.model.head = learner.head
            if learner.shares:
                control = plain = plain or decode(model, prompts, False, args.limit, args.compile)
            else:
                control = decode(learner.model, prompts, False, args.limit, args.compile)
            record = {
                "variant": learner.variant.name,
                "seed": seed,
                **settings,
                "parameters": parameters(learner.head),
                "seconds": statistics.median(learner.seconds),
                **numbers,
                "tasks": decoded(decode(learner.model, prompts, True, args.limit, args.compile), control),
            }
            records.append(record)
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
    wanted = [r for variant in chosen for r in records if r["variant"] == variant.name and r["seed"] < args.seeds]
    print("\n\n".join(tables(wanted)))
    if args.plot:
        plot(args.plot, wanted)


if __name__ == "__main__":
    main()
