"""Plain and speculative decoding side by side: equal output, tokens per pass, acceptance, and the ratio of speeds.

Times of two runs on a shared machine cannot be compared; times of neighbours can. So every prompt is decoded plainly and
speculatively in turn, with the order exchanged from prompt to prompt, and the ratio is the median over prompts. Of prompts that share
batches the time of all counts, for that of each hangs on who else is there.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.data.loader import ShardDataset
from mmtp.decode.sample import Sampling
from mmtp.decode.stats import DecodeStats, Generation
from mmtp.eval.report import Figure, Heading, Section, Table, Text, Tiles, bars
from mmtp.eval.shapes import COLOURS, SHAPES
from mmtp.eval.vqa import easy_vqa_samples
from mmtp.models.heads.base import BELOW, FORCED, offset_name
from mmtp.pipeline import Pipeline
from mmtp.stream.vocab import Special
from mmtp.types import Modality

WAVES = 3
"""Prompts that go through a batch in turn, in batches: enough that it is mostly full."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@runtime_checkable
class Decoder(Protocol):
    """What is measured; :class:`mmtp.decode.engine.Engine` is one."""

    def generate(
        self, prefix: Sequence[int], sampling: Sampling, max_new_tokens: int, speculative: bool, stop: Collection[int]
    ) -> Generation:
        """A continuation with its statistics."""
        ...

    def generate_batch(
        self,
        prefixes: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        max_new_tokens: int,
        speculative: bool,
        stop: Collection[int],
        *,
        max_lanes: int,
    ) -> list[Generation]:
        """Continuations of several, so many lanes at a time."""
        ...


@dataclass(frozen=True)
class Prompt:
    """What to continue.

    Attributes:
        kind: groups results ("picture", "answer").
        tokens: the start of a stream.
        max_new_tokens: limit.
        stop: ids that end the continuation.
        features: what a model's connector makes the vectors of, which its ``<feature>`` tokens stand for; None where it has none.
        feature_grids: extent of every span's grid of them.
    """

    kind: str
    tokens: Sequence[int]
    max_new_tokens: int
    stop: Collection[int] = ()
    features: Float[Tensor, "n c"] | None = None
    feature_grids: Int[Tensor, "spans axes"] | None = None


@dataclass(frozen=True)
class Pair:
    """One prompt, decoded both ways.

    Attributes:
        kind: of the prompt.
        temperature: of sampling.
        plain: statistics without drafts.
        speculative: statistics with drafts.
        equal: whether both gave the same tokens.
        tokens: what plain decoding gave, without the prompt.
    """

    kind: str
    temperature: float
    plain: DecodeStats
    speculative: DecodeStats
    equal: bool
    tokens: Sequence[int]

    @property
    def speedup(self) -> float:
        """Tokens per second of speculative over plain decoding."""
        return _rate(self.speculative) / _rate(self.plain)

    @property
    def behind(self) -> float | None:
        """The same of the tokens behind those of the first pass, which reads the prompt; None where there are none, or nobody timed it."""
        rates = [_rate_behind(stats) for stats in (self.speculative, self.plain)]
        return rates[0] / rates[1] if rates[0] and rates[1] else None

    @property
    def round(self) -> float:
        """Time of a round of speculative decoding, in passes of plain decoding."""
        return _per_pass(self.speculative) / _per_pass(self.plain)

    @property
    def drafting(self) -> float:
        """Part of :attr:`round` that drafts take; the rest verifies them."""
        return self.round * self.speculative.drafting / max(self.speculative.seconds, 1e-9)


@dataclass(frozen=True)
class DecodingResult:
    """All pairs of one run."""

    pairs: Sequence[Pair]

    @property
    def all_equal(self) -> bool:
        return all(p.equal for p in self.pairs)

    def of(self, kind: str | None = None, temperature: float | None = None) -> "DecodingResult":
        """The pairs of a kind or temperature."""
        return DecodingResult([p for p in self.pairs if kind in (None, p.kind) and temperature in (None, p.temperature)])

    @property
    def speedup(self) -> float:
        """Median over prompts of the ratio of tokens per second."""
        return statistics.median(p.speedup for p in self.pairs) if self.pairs else 0.0

    @property
    def behind(self) -> float | None:
        """The same of the tokens behind the first pass, which reads the prompt; None where that was not timed."""
        ratios = [ratio for pair in self.pairs if (ratio := pair.behind) is not None]
        return statistics.median(ratios) if ratios else None

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one pass of the model gives, with drafts. Plain decoding gives 1."""
        passes = sum(p.speculative.passes for p in self.pairs)
        return sum(p.speculative.generated for p in self.pairs) / passes if passes else 0.0

    def acceptance(self) -> dict[tuple[str, int], tuple[int, int]]:
        """(modality, offset) -> (accepted, drafted)."""
        totals: dict[tuple[str, int], tuple[int, int]] = {}
        for pair in self.pairs:
            for (modality, offset), drafted in pair.speculative.drafted.items():
                accepted = pair.speculative.accepted.get((modality, offset), 0)
                key = (str(modality), offset)
                before = totals.get(key, (0, 0))
                totals[key] = (before[0] + accepted, before[1] + drafted)
        return dict(sorted(totals.items()))

    def groups(self) -> list[tuple[str, float]]:
        """(kind, temperature) in the order in which they first came."""
        return list(dict.fromkeys((p.kind, p.temperature) for p in self.pairs))

    def table(self, caption: str = "") -> Table:
        rows = []
        for kind, temperature in self.groups():
            part = self.of(kind, temperature)
            plain = statistics.median(_rate(p.plain) for p in part.pairs)
            fast = statistics.median(_rate(p.speculative) for p in part.pairs)
            equal = sum(p.equal for p in part.pairs)
            rows.append(
                [
                    kind,
                    f"{temperature:g}",
                    len(part.pairs),
                    f"{equal} of {len(part.pairs)}",
                    f"{part.tokens_per_pass:.2f}",
                    f"{statistics.median(p.drafting for p in part.pairs):.2f}",
                    f"{statistics.median(p.round - p.drafting for p in part.pairs):.2f}",
                    f"{plain:.0f}",
                    f"{fast:.0f}",
                    f"{part.speedup:.2f} ×",
                    None if part.behind is None else f"{part.behind:.2f} ×",
                ]
            )
        columns = [
            "decodes",
            "temperature",
            "prompts",
            "equal",
            "tokens / pass",
            "drafts",
            "verification",
            "plain tokens / s",
            "MTP tokens / s",
            "speed",
            "behind the prompt",
        ]
        return Table(columns, rows, caption)

    def equal_streams(self, modality: str, offset: int) -> tuple[int, int]:
        """Of the streams with such drafts: how many equal plain decoding, and how many there are."""
        streams = [pair.equal for pair in self.pairs if pair.speculative.drafted.get((modality, offset))]
        return sum(streams), len(streams)

    def acceptance_table(self, caption: str = "") -> Table:
        """Share of drafts that were accepted, by modality, offset and direction, and whether the output stayed that of plain decoding."""
        rows = []
        for (modality, offset), (accepted, drafted) in self.acceptance().items():
            equal, streams = self.equal_streams(modality, offset)
            share = f"{100 * accepted / drafted:.1f} %" if drafted else None
            told = "yes" if equal == streams else f"no: {equal} of {streams}"
            rows.append([modality, offset_name(offset), direction(modality, offset), drafted, accepted, share, told])
        return Table(["modality", "offset", "direction", "drafted", "accepted", "share", "output equal"], rows, caption)

    def sections(self) -> list[Section]:
        """What a report shows of it."""
        equal = sum(pair.equal for pair in self.pairs)
        tiles = [(f"{equal} of {len(self.pairs)}", "streams equal plain decoding", "token for token")]
        tiles += [
            (f"{part.tokens_per_pass:.2f}", f"tokens per pass, {kind}", f"temperature {temperature:g}; speed {part.speedup:.2f} ×")
            for kind, temperature in self.groups()
            for part in [self.of(kind, temperature)]
        ]
        found: list[Section] = [Tiles(tiles), Heading("Speed"), self.table(), Heading("Drafts accepted")]
        for temperature in dict.fromkeys(pair.temperature for pair in self.pairs):
            part = self.of(temperature=temperature)
            found += [
                Heading(f"Temperature {temperature:g}", 3),
                part.acceptance_table(),
                part.acceptance_figure("share of drafts that stood"),
            ]
        words = (
            "What drafts and their verification cost is told in passes of plain decoding; the speed is tokens per pass over their sum, and "
            "behind the prompt that of the tokens after the first pass, which reads it. "
            "A draft counts as accepted where it and all before it stood. In pictures and videos offsets +1, +2, … go along the row and "
        )
        words += (
            "'below' comes from the row above; 'carried' was chosen in the pass before, behind a draft that was refused, and 'nearby' is "
        )
        return [
            *found,
            Text(f"{words}drafted by the nearest place; 'forced' are tokens about which grammar or a constraint leave no choice."),
        ]

    def acceptance_figure(self, caption: str = "") -> Figure:
        """Share of drafts that were accepted, per offset, one series per modality."""
        totals = self.acceptance()
        offsets = sorted({offset for _, offset in totals})
        modalities = list(dict.fromkeys(modality for modality, _ in totals))
        share = {key: accepted / drafted for key, (accepted, drafted) in totals.items() if drafted}
        series = {m: [share.get((m, o)) for o in offsets] for m in modalities}
        return bars([offset_name(o) for o in offsets], series, "share accepted", caption, top=1.0)

    def to_dict(self) -> dict[str, Any]:
        """Figures in plain values."""
        return {
            "prompts": len(self.pairs),
            "all_equal": self.all_equal,
            "groups": [
                {
                    "kind": kind,
                    "temperature": temperature,
                    "prompts": len(part.pairs),
                    "equal": sum(p.equal for p in part.pairs),
                    "tokens_per_pass": round(part.tokens_per_pass, 3),
                    "speedup": round(part.speedup, 3),
                    "speedup_behind_prompt": None if part.behind is None else round(part.behind, 3),
                    "drafts_cost": round(statistics.median(p.drafting for p in part.pairs), 3),
                    "verification_cost": round(statistics.median(p.round - p.drafting for p in part.pairs), 3),
                    "plain_tokens_per_second": round(statistics.median(_rate(p.plain) for p in part.pairs), 2),
                    "speculative_tokens_per_second": round(statistics.median(_rate(p.speculative) for p in part.pairs), 2),
                }
                for kind, temperature in self.groups()
                for part in [self.of(kind, temperature)]
            ],
            "acceptance": [
                {
                    "modality": m,
                    "offset": offset_name(o),
                    "direction": direction(m, o),
                    "accepted": accepted,
                    "drafted": drafted,
                    "equal": equal == streams,
                }
                for (m, o), (accepted, drafted) in self.acceptance().items()
                for equal, streams in [self.equal_streams(m, o)]
            ],
        }


def direction(modality: str, offset: int) -> str:
    """Which way a draft lies from its anchor: along the row or below it in pictures and videos, ahead in time elsewhere."""
    if modality not in (Modality.IMAGE, Modality.VIDEO) or offset == FORCED:
        return "ahead"
    return "vertical" if offset == BELOW else "horizontal"


def compare(
    engine: Decoder,
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    repeats: int = 1,
    batch: int = 1,
    max_seconds: float | None = None,
    progress: Progress | None = None,
) -> DecodingResult:
    """Decodes every prompt at every temperature plainly and speculatively in turn.

    Args:
        engine: what is measured.
        prompts: what to continue.
        sampling: top-k, top-p and the first seed, which counts up over the prompts.
        temperatures: of sampling; 0 is greedy.
        repeats: how often each way is timed; the median time counts.
        batch: prompts of a kind that are decoded together, others following as they end; seconds are then a prompt's part of those of all,
            by the tokens that it got.
        max_seconds: decodes no further prompts after so long.
        progress: called with pairs decoded and pairs wanted.
    """
    pairs: list[Pair] = []
    began = time.monotonic()
    if prompts:  # The first call pays for what later ones do not: allocation, choice of kernels.
        for speculative in (False, True):
            engine.generate(prompts[0].tokens, sampling, min(prompts[0].max_new_tokens, 16), speculative, ())
    size = 1 if batch == 1 else WAVES * batch
    for i, group in enumerate(_batches(prompts, size)):
        if i > 1 and max_seconds is not None and time.monotonic() - began > max_seconds:
            break
        for temperature in temperatures:
            chosen = [replace(sampling, temperature=temperature, seed=sampling.seed + i * size + j) for j in range(len(group))]
            runs: dict[bool, list[list[Generation]]] = {False: [], True: []}
            for turn in range(2 * repeats):
                speculative = (turn + i) % 2 == 1
                runs[speculative].append(_decode(engine, group, chosen, speculative, batch))
            for j, prompt in enumerate(group):
                outputs = [run[j].new_tokens for way in runs.values() for run in way]
                plain, fast = (_median([run[j] for run in runs[way]]) for way in (False, True))
                equal = all(tokens == outputs[0] for tokens in outputs)
                pairs.append(Pair(prompt.kind, temperature, plain, fast, equal, outputs[0]))
                if progress is not None:
                    progress(len(pairs), len(prompts) * len(temperatures))
    return DecodingResult(pairs)


def _batches(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """Prompts in batches of what can be decoded together, in the order in which each batch began."""
    if size == 1:
        return [[prompt] for prompt in prompts]
    found: list[list[Prompt]] = []
    filling: dict[tuple[str, int, tuple[int, ...]], list[Prompt]] = {}
    for prompt in prompts:
        key = (prompt.kind, prompt.max_new_tokens, tuple(prompt.stop))
        if len(filling.get(key, ())) in (0, size):
            filling[key] = []
            found.append(filling[key])
        filling[key].append(prompt)
    return found


def _decode(engine: Decoder, group: Sequence[Prompt], samplings: Sequence[Sampling], speculative: bool, batch: int) -> list[Generation]:
    first = group[0]
    if batch == 1:
        return [engine.generate(first.tokens, samplings[0], first.max_new_tokens, speculative, first.stop)]
    prefixes, lanes = [prompt.tokens for prompt in group], batch * (1 + samplings[0].guided)
    rows = engine.generate_batch(prefixes, samplings, first.max_new_tokens, speculative, first.stop, max_lanes=lanes)
    seconds, generated = max(row.stats.seconds for row in rows), max(1, sum(row.stats.generated for row in rows))
    busy = sum(row.stats.seconds - row.stats.waited for row in rows)
    drafting = seconds * sum(row.stats.drafting for row in rows) / max(busy, 1e-9)
    parts = [row.stats.generated / generated for row in rows]
    return [
        replace(row, stats=replace(row.stats, seconds=part * seconds, first=0.0, drafting=part * drafting))
        for row, part in zip(rows, parts, strict=True)
    ]


def easy_vqa_prompts(pipeline: Pipeline, count: int, max_picture_tokens: int = 96) -> list[Prompt]:
    """Prompts of both directions in turn: every other one asks for a picture ("draw a blue circle"), the rest for answers.

    Args:
        pipeline: a model that draws and answers.
        count: prompts in all.
        max_picture_tokens: limit of a picture, its opener, dims and closer included.
    """
    captions = [f"a {colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
    stop = (int(Special.END),)
    samples = easy_vqa_samples("test", limit=max(1, count // 2))
    segments = pipeline.encode_pictures([s.picture for s in samples])
    prompts = []
    for i in range(count):
        if i % 2 == 0:
            tokens = pipeline.draw_prompt(captions[i // 2 % len(captions)])
            prompts.append(Prompt("picture", tokens, max_picture_tokens, stop))
        else:
            asked = i // 2 % len(samples)
            prompts.append(Prompt("answer", pipeline.vqa_prompt(segments[asked], samples[asked].question), 16, stop))
    return prompts


def held_out_prompts(datasets: Iterable[ShardDataset], count: int, max_new_tokens: int | None = 512) -> list[Prompt]:
    """Prompts from documents: what stands before the first target of each, of documents spread evenly over the data sets.

    Args:
        datasets: of ``mmtp tokenize``, by the model's vocabulary; prompts are of the kind of their task.
        count: prompts of each task.
        max_new_tokens: limit of a continuation; None for as many as the document has.
    """
    found: dict[str, list[Prompt]] = {}
    for row in (row for dataset in datasets for row in dataset):
        if start := int(row.target_mask.argmax()):
            kind = row.meta["task"]
            tokens, given = row.tokens[:start].tolist(), row.packed()
            read = Special.FEATURE in tokens  # else they are what is to be written
            grids = torch.from_numpy(given.feature_grids) if read and given.feature_grids is not None else None
            limit = len(row.tokens) - start if max_new_tokens is None else max_new_tokens
            prompt = Prompt(kind, tokens, limit, features=given.features if read else None, feature_grids=grids)
            found.setdefault(kind, []).append(prompt)
    chosen = [prompts[:: max(1, len(prompts) // count)][:count] for prompts in found.values()]
    return [prompt for turn in zip_longest(*chosen) for prompt in turn if prompt is not None]


def _median(runs: list[Generation]) -> DecodeStats:
    """Statistics of the run whose time is the (upper) median."""
    return sorted((run.stats for run in runs), key=lambda stats: stats.seconds)[len(runs) // 2]


def _per_pass(stats: DecodeStats) -> float:
    return max(stats.seconds, 1e-9) / max(1, stats.passes)


def _rate(stats: DecodeStats) -> float:
    return stats.generated / max(stats.seconds, 1e-9)


def _rate_behind(stats: DecodeStats) -> float | None:
    """Tokens per second behind those of the first pass."""
    tokens = stats.generated - sum(stats.per_pass[:1])
    return tokens / max(stats.seconds - stats.first, 1e-9) if tokens and stats.first else None
