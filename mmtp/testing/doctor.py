"""What may be wrong with a model on this machine: a short set of checks, each with what was found and what to do.

Acceptance is judged by what drafts that know nothing reach on the same streams (:func:`mmtp.eval.drafts.uninformed`), and by the table of
the model's card. The other checks are of promises: equal output, equal choices, weights that are numbers, tokenizers that are those of
the training, the golden file.
"""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from math import sqrt
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from packaging.requirements import Requirement
from torch import Tensor

from mmtp.data.engines.local import cores
from mmtp.decode.cache import KVCache
from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling
from mmtp.eval.decoding import Prompt, compare
from mmtp.eval.drafts import Drafting, draft, propagation, uninformed
from mmtp.hub import find, from_pretrained
from mmtp.models.heads.base import BELOW, offset_name
from mmtp.models.unified import UnifiedModel
from mmtp.pipeline import Pipeline
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.template import draw_prompt, say_prompt, vqa_prompt
from mmtp.stream.vocab import NUM_DIMS, OPENERS, Special, VocabLayout
from mmtp.testing.card import table_rows
from mmtp.testing.golden import Golden, check_model_golden, read_golden
from mmtp.train.memory import available_memory
from mmtp.types import MmtpError, Modality

ENOUGH = 20  # drafts, below which a share says nothing
NEAR_CARD = 0.5  # share of the card's acceptance that is still no finding; prompts differ
FEW_CELLS = 8  # extent of a picture along an axis, where the golden file shows none
WIDTH = 8

Progress = Callable[[str], None]
"""Called with the name of the check that begins."""


class DoctorError(MmtpError):
    """What is to be examined is no unified model."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: its name.
        state: ``wrong`` where a promise is broken, ``note`` where a person should look.
        said: what was found.
        advice: what to do; empty where all is well.
    """

    check: str
    state: Literal["ok", "note", "wrong"]
    said: str
    advice: str = ""


def examine(name: str | Path, *, words: str = "a blue circle", seeds: int = 4, progress: Progress | None = None) -> list[Finding]:
    """Examines a model: a zoo entry, a folder or a Hub id.

    Args:
        name: of the model.
        words: what it is asked to draw, say and answer; a model of another subject speculates as in its own only on its own words.
        seeds: streams per medium and temperature.
        progress: told what begins.

    Raises:
        HubError: nothing is found, or its weights do not fit.
        DoctorError: it is no unified model.
    """
    tell = progress or (lambda check: None)
    tell("libraries and machine")
    findings = [*check_libraries(), *check_machine()]
    tell("loading")
    folder = find(name)
    model = from_pretrained(folder)
    if not isinstance(model, UnifiedModel):
        raise DoctorError(f"{name}: is a {type(model).__name__}; mmtp doctor examines models, and mmtp zoo --check tokenizers")
    weights = check_weights(model)
    findings += [check_memory(model), weights]
    vocabulary, pipeline = check_vocabulary(folder, model)
    findings.append(vocabulary)
    tell("golden file")
    finding, golden = check_golden(folder, model)
    findings.append(finding)
    if weights.state == "wrong":
        return [*findings, Finding("decoding", "note", "not tried, for the weights are damaged")]
    prompts = example_prompts(model.config.layout, pipeline, golden, words, seeds)
    tell("kernels")
    findings += check_kernels(model, prompts[0])
    return findings + check_drafts(model, prompts, read_acceptance(folder / "README.md"), tell)


def check_libraries() -> list[Finding]:
    """Versions of what mmtp depends on, and whether they are in the range that it supports; extras where they are installed."""
    try:
        wanted = [Requirement(line) for line in metadata.requires("mmtp") or ()]
    except metadata.PackageNotFoundError:
        return [
            Finding(
                "libraries", "note", "mmtp runs from a folder, not as an installed package, so ranges are not known", "pip install -e ."
            )
        ]
    findings, shown = [], [f"Python {platform.python_version()}"]
    for requirement in wanted:
        extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if not extra:
                findings.append(Finding("libraries", "wrong", f"{requirement.name} is missing", f"pip install '{requirement}'"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            said = f"{requirement.name} {version} is outside of {requirement.specifier}"
            advice = f"pip install '{requirement.name}{requirement.specifier}'"
            findings.append(Finding("libraries", "note" if extra else "wrong", said, advice))
        elif requirement.name in ("torch", "torchaudio", "torchvision", "tokenizers", "transformers", "llguidance"):
            shown.append(f"{requirement.name} {version}")
    return findings or [Finding("libraries", "ok", ", ".join(dict.fromkeys(shown)))]


def check_machine() -> list[Finding]:
    """Threads against cores, and other work. They decide speed alone, so they are notes."""
    threads, have, asked = torch.get_num_threads(), cores(), os.environ.get("OMP_NUM_THREADS")
    said = f"{threads} threads on {have} cores, OMP_NUM_THREADS {asked or 'not set'}"
    if threads > have:
        return [Finding("threads", "note", said, f"more threads than cores slow each other down: OMP_NUM_THREADS={have}")]
    load = os.getloadavg()[0]
    if load > have + 0.5:
        return [Finding("threads", "note", f"{said}; {load:.1f} programs want to run", "speeds measured now are not to be relied on")]
    return [Finding("threads", "ok", said)]


def check_memory(model: UnifiedModel) -> Finding:
    """Whether weights and the cache of a whole turn fit in what is free."""
    device = model.unembedding.weight.device
    backbone, free = model.config.backbone, available_memory(device)
    cache = 2 * 4 * (backbone.depth + model.head.num_caches) * backbone.num_kv_heads * backbone.head_dim * 4352
    said = f"{_mib(free)} free on {device.type}; weights {_mib(4 * model.num_parameters())}, cache of 4,352 tokens {_mib(cache)} a row"
    if cache > free:
        return Finding("memory", "wrong", said, "free some, or decode fewer rows and tokens at a time")
    return Finding("memory", "ok", said)


def check_weights(model: UnifiedModel) -> Finding:
    """Whether all weights are numbers; names the first that is none."""
    broken = [(name, int((~w.isfinite()).sum()), w.numel()) for name, w in model.state_dict().items() if not w.isfinite().all()]
    if broken:
        name, count, size = broken[0]
        more = f", and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        advice = "the training diverged or the file is damaged: go back to an earlier checkpoint, or fetch it again"
        return Finding("weights", "wrong", f"{name}: {count:,} of {size:,} are NaN or infinite{more}", advice)
    return Finding("weights", "ok", f"{model.num_parameters():,}, all finite")


def check_vocabulary(folder: Path, model: UnifiedModel) -> tuple[Finding, Pipeline | None]:
    """Whether the tokenizers that the model names are found, with the fingerprints that it was trained with."""
    try:
        pipeline = Pipeline.from_pretrained(folder)
    except MmtpError as error:
        advice = "put the tokenizers of the training where their names are looked for, or train the model on with the new ones"
        return Finding("vocabulary", "wrong", str(error), advice), None
    return Finding("vocabulary", "ok", f"{model.config.layout.size:,} ids; {', '.join(pipeline.tokenizers)} as in training"), pipeline


def check_golden(folder: Path, model: UnifiedModel) -> tuple[Finding, Golden | None]:
    """Whether the golden file is reproduced."""
    path = folder / "golden.safetensors"
    if not path.exists():
        return Finding("golden file", "note", "there is none", "with one (mmtp.testing.golden), a change of machine or library shows"), None
    try:
        golden = read_golden(path)
    except MmtpError as error:
        return Finding("golden file", "wrong", str(error), "fetch it again"), None
    try:
        check_model_golden(model, golden)
    except MmtpError as error:
        advice = "weights, libraries or kernels are not those of the release; compare versions with the card's"
        return Finding("golden file", "wrong", str(error), advice), golden
    return Finding("golden file", "ok", f"reproduced to {golden.tolerance:.1g}"), golden


def example_prompts(layout: VocabLayout, pipeline: Pipeline | None, golden: Golden | None, words: str, seeds: int) -> list[Prompt]:
    """Streams to go on with, ``seeds`` of each medium that the model writes, text among them; their kinds are the media."""
    known = [] if golden is None or Special.FEATURE in golden.tensors["tokens"] else golden.tensors["tokens"].tolist()

    def encode(text: str) -> Sequence[int]:
        return (
            pipeline.encode_text(text)
            if pipeline is not None
            else [ord(letter) % layout.text.size for letter in text]
            if layout.text
            else []
        )

    prompts = []
    if layout.text is not None:
        asked = (
            known[: known.index(Special.ASSISTANT) + 1] if Special.ASSISTANT in known else vqa_prompt(layout, encode, None, words).tolist()
        )
        prompts += [Prompt(str(Modality.TEXT), asked, 24, (int(Special.END),))] * seeds
    for entry in layout.media:
        if entry.continuous:
            continue
        opener, dims = OPENERS[entry.modality], [min(FEW_CELLS, layout.max_dim)] * NUM_DIMS[entry.modality]
        asked = [*(say_prompt if entry.modality is Modality.AUDIO else draw_prompt)(layout, encode, words).tolist(), int(opener)]
        if opener in known:
            asked += known[known.index(opener) + 1 :][: len(dims)]
        else:
            asked += [layout.dim(n) for n in dims]
        prompts += [Prompt(str(entry.modality), asked, 96, (int(Special.END),))] * seeds
    return prompts


def check_kernels(model: UnifiedModel, prompt: Prompt) -> list[Finding]:
    """Whether a pass repeats itself, and what its width and its batch change: in logits, and in the choices of exact mode."""
    sampling, engine = Sampling(seed=1), Engine(model, exact=True)
    tokens = engine.generate(prompt.tokens, sampling, 2 * WIDTH, speculative=False).tokens
    cut = max(1, len(tokens) - WIDTH)
    one, again = (_logits(model, tokens, cut, 1, 1) for _ in range(2))
    off = float((one - again).abs().max())
    wide, rows = _logits(model, tokens, cut, WIDTH, 1), _logits(model, tokens, cut, 1, WIDTH)
    by_width, by_rows = (float((one - other).abs().max()) for other in (wide, rows))
    said = (
        f"logits of a pass repeated differ by {off:.2g}, of {WIDTH} tokens at once by {by_width:.2g}, among {WIDTH} rows by {by_rows:.2g}"
    )
    advice = "torch.use_deterministic_algorithms(True) names the kernel"
    findings = [Finding("kernels", "wrong" if off else "ok", said, advice if off else "")]
    for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        chosen = Sampling(seed=1, temperature=temperature)
        alone = engine.generate(prompt.tokens, chosen, 2 * WIDTH).new_tokens
        among = engine.generate_batch([prompt.tokens] * WIDTH, [chosen] * WIDTH, 2 * WIDTH)
        same = sum(row.new_tokens == alone for row in among)
        said = f"{how} choices of a row alone and among {WIDTH}, in exact mode: {same} of {WIDTH} equal"
        advice = "these kernels depend on the number of rows: output is exact in distribution, not token for token"
        findings.append(Finding("choices", "ok" if same == WIDTH else "wrong", said, "" if same == WIDTH else advice))
    return findings


@torch.no_grad()
def _logits(model: UnifiedModel, tokens: list[int], cut: int, width: int, rows: int) -> Float[Tensor, "s v"]:
    """Of the places from ``cut`` on, read ``width`` at a time after one pass over what stands before; the last of ``rows`` equal rows."""
    backbone, weight = model.config.backbone, model.unembedding.weight
    info = StreamGrammar(model.config.layout).analyse(torch.tensor(tokens))
    places = torch.from_numpy(info.positions).to(weight.device)
    cache = KVCache(backbone.num_caches, rows, backbone.num_kv_heads, backbone.head_dim, len(tokens), weight.device, weight.dtype)
    out = []
    for start, end in [(0, cut), *((at, min(at + width, len(tokens))) for at in range(cut, len(tokens), width))]:
        ids = torch.tensor([tokens[start:end]] * rows, device=weight.device)
        mask = cache.begin(end - start)
        positions = places[start:end].long().expand(rows, -1, -1)
        slots = [info.slots[start:end].tolist()] * rows
        out.append(model.backbone.norm(model.extend(model.embed(ids), positions, mask, cache.layers, slots))[-1])
        cache.commit([end - start] * rows)
    return torch.cat(out[1:]) @ weight.T


def check_drafts(model: UnifiedModel, prompts: Sequence[Prompt], card: dict[tuple[str, str], float], tell: Progress) -> list[Finding]:
    """Whether speculation is lossless, whether its drafts are worth their cost, and whether spoiled ones stay without effect."""
    if not model.head.mtp_depth:
        return [Finding("drafts", "note", "the model has no draft head", 'train one: [model] head = { type = "synchronized" } in a recipe')]
    tell("plain and speculative decoding")
    engine = Engine(model, exact=True, draft_cost=0, drafts=HeadDrafts())
    result = compare(engine, prompts, temperatures=(0.0, 1.0))
    findings = []
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        part = result.of(kind)
        equal = sum(pair.equal for pair in part.pairs)
        said = f"{kind}: {equal} of {len(part.pairs)} streams equal plain decoding, {part.tokens_per_pass:.2f} tokens per pass"
        advice = "" if part.all_equal else "speculation is not lossless here: decode with --plain, and report the versions above"
        findings.append(Finding("speculation", "ok" if part.all_equal else "wrong", said, advice))
    tell("drafts")
    own, chance = draft(engine, prompts, Sampling()), uninformed(engine, prompts, Sampling())
    findings += judge_acceptance(own, chance, card)
    tell("spoiled drafts")
    drafted = {modality for modality, _ in own.drafted}
    for found in propagation(engine, prompts, Sampling(), [m for m in model.config.layout.modalities if str(m) in drafted], own):
        shares = ", ".join(
            f"{m} {found.before.share(m):.0%} → {found.after.share(m) or 0:.0%}"
            for m in sorted(drafted)
            if found.before.share(m) is not None
        )
        moved = "no token moved" if found.equal else "tokens moved"
        advice = "" if found.equal else "errors of drafts reach the output: decode with --plain, and report the versions above"
        said = f"random drafts of {found.modality}: {moved}; accepted {shares}"
        findings.append(Finding("spoiled drafts", "ok" if found.equal else "wrong", said, advice))
    return findings


def judge_acceptance(own: Drafting, chance: Drafting, card: dict[tuple[str, str], float]) -> list[Finding]:
    """Acceptance per modality and offset, sampled, beside that of drafts that know nothing and the card's.

    Args:
        own: the model's drafts.
        chance: drafts that know nothing, on the same streams.
        card: (modality, offset in words) -> share.
    """
    findings = []
    for (modality, offset), drafted in sorted(own.drafted.items()):
        share = own.accepted[modality, offset] / drafted
        by_chance = chance.accepted[modality, offset] / max(1, chance.drafted[modality, offset])
        stated = card.get((modality, offset_name(offset)))
        beside = f" (by chance {by_chance:.1%}{'' if stated is None else f', card {stated:.0%}'})"
        said = f"{modality} {offset_name(offset)}: {share:.1%} of {drafted:,}{beside}"
        margin = 2 * sqrt(max(by_chance * (1 - by_chance), 0.01) / drafted)
        if drafted < ENOUGH:
            findings.append(Finding("acceptance", "ok", f"{said}; too few to judge"))
        elif share <= by_chance + margin and offset in (1, BELOW):
            advice = f"head untrained or broken: its drafts of {modality} add cost and no speed; train it, or decode with --plain"
            findings.append(Finding("acceptance", "wrong", said, advice))
        elif share <= by_chance + margin:
            findings.append(Finding("acceptance", "note", said, "no better than chance: drafts this far add cost; use fewer offsets"))
        elif stated is not None and share < NEAR_CARD * stated:
            findings.append(Finding("acceptance", "note", said, "far below the card: other weights, or words of another subject (--words)"))
        elif share == 1.0 and modality != Modality.TEXT:
            findings.append(Finding("acceptance", "note", said, "suspicious in sampled streams: does the model write one thing only?"))
        else:
            findings.append(Finding("acceptance", "ok", said))
    return findings


def read_acceptance(card: Path) -> dict[tuple[str, str], float]:
    """The card's table of accepted drafts: (modality, offset in words) -> share; empty where there is none."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    _, found, rest = text.partition("| drafts accepted |")
    if not found:
        return {}
    columns, *rows = table_rows(found + rest)
    return {
        (row[0], offset): float(cell.rstrip(" %")) / 100 for row in rows for offset, cell in zip(columns[1:], row[1:], strict=False) if cell
    }


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
