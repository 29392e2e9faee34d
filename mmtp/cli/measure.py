"""What ``mmtp eval`` measures of models, of features and of text tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from mmtp.cli.tables import Step
    from mmtp.decode.sample import Sampling
    from mmtp.eval.report import Section, Table

EASY_VQA = "easy-vqa:test"


class Measured(NamedTuple):
    """What a measurement gives.

    Attributes:
        headline: the figure that ``--at-least`` looks at: a share from 0 to 1, dB for those of pictures and videos, STOI for sound;
            None where it could not be measured.
        tables: for people.
        values: for machines.
        figures: for a report.
    """

    headline: float | None
    tables: "list[Table]"
    values: dict[str, Any]
    figures: "Sequence[Section]" = ()


def vqa(name: str, tokenizers: Sequence[str] | None, limit: int | None, controls: bool, batch_size: int, bar: "Step") -> Measured:
    from mmtp.eval.vqa import easy_vqa_prior, easy_vqa_samples, evaluate
    from mmtp.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(name, tokenizers=tokenizers)
    samples = easy_vqa_samples("test", limit)
    result = evaluate(pipeline, samples, prior=easy_vqa_prior(), controls=controls, batch_size=batch_size, progress=bar)
    return Measured(result.accuracy, [result.table(f"{name}: easy-VQA, test questions answered right")], result.to_dict())


def draw(
    name: str, tokenizers: Sequence[str] | None, seeds: int, sampling: "Sampling", candidates: int, max_tokens: int, bar: "Step"
) -> Measured:
    from mmtp.eval.generation import evaluate
    from mmtp.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(name, tokenizers=tokenizers)
    result = evaluate(pipeline, seeds=seeds, sampling=sampling, candidates=candidates, max_new_tokens=max_tokens, progress=bar)
    settings = {key: getattr(sampling, key) for key in ("temperature", "top_k", "top_p", "guidance")} | {"candidates": candidates}
    said = ", ".join(f"{key.replace('_', '-')} {value:g}" for key, value in settings.items())
    table = result.table(f"{name}: pictures drawn right, {seeds} of each; {said}")
    return Measured(result.accuracy, [table], {**result.to_dict(), **settings})


def parser(data: list[str], limit: int | None, bar: "Step") -> Measured:
    from mmtp.eval.generation import judge, labelled_pictures

    samples = [sample for source in data for sample in labelled_pictures(source, limit)][:limit]
    result = judge(samples, progress=bar)
    return Measured(result.accuracy, [result.table(f"parser: real pictures of {named(data)} read right")], result.to_dict())


def probe(
    name: str,
    bank: list[str] | None,
    data: list[str] | None,
    labels: list[str] | None,
    size: str | None,
    limit: int | None,
    teachers: Path | None,
    bar: "Step",
) -> Measured:
    from dataclasses import asdict

    import torch

    from mmtp.cli.tokenize import parse_size
    from mmtp.config import from_dict, load_file
    from mmtp.eval import probes
    from mmtp.eval.inputs import Inputs
    from mmtp.eval.probes import Labelled, probe_table, retrieval
    from mmtp.eval.report import Table
    from mmtp.hub import find, from_pretrained
    from mmtp.models.teachers import Teacher, TeacherConfig
    from mmtp.types import MmtpError

    bank, data = _bank(bank, data, "probe")
    if len(labels := labels or ["caption"]) > 1:
        raise MmtpError(f"mmtp eval probe: one --label at a time; {', '.join(labels)} given")
    (label,) = labels
    frozen: list[Teacher] = []
    if teachers is not None:
        recipe = load_file(teachers / "recipe.toml" if teachers.is_dir() else teachers)
        tables = recipe.get("loss", {}).get("distill", {}).get("teachers", [])
        frozen = [Teacher(from_dict(TeacherConfig, table, "loss.distill.teachers"), Path(), torch.device("cpu")) for table in tables]
    frame = parse_size(size or "64")
    parts = []
    for sources in (bank, data):
        seen = Inputs(sources, limit=limit, progress=bar).labelled([label], frame)
        parts.append(Labelled.of((picture, str(known[label]), known.get("caption", "")) for picture, known in seen))
    fitted_on, held_out = parts
    tokenizer = from_pretrained(name)
    found = probes.probe(tokenizer, name, fitted_on, held_out, frozen)
    shown = [probe_table(found, f"{name}: {label} of {named(data)}, as the features tell; {len(held_out.labels):,} pictures")]
    values: dict[str, Any] = {"pictures": len(held_out.labels), "features": [asdict(p) for p in found]}
    if (towers := find(name) / "towers").is_dir():
        recalls = values["retrieval"] = retrieval(tokenizer, from_pretrained(towers), held_out)
        rows = [[key.replace("_", " "), f"{value:,.0f}" if "@" not in key else f"{value:.3f}"] for key, value in recalls.items()]
        shown.append(Table(["recall", "value"], rows, f"{name}: pictures and captions of {named(data)} find each other"))
    return Measured(found[0].neighbours, shown, values)


def loss(name: str, data: list[str] | None, inputs: tuple[str, ...], bar: "Step") -> Measured:
    from mmtp.data.loader import ShardDataset
    from mmtp.eval.likelihood import evaluate_likelihood
    from mmtp.hub import from_pretrained
    from mmtp.models.unified import UnifiedModel
    from mmtp.types import MmtpError

    if not data:
        raise MmtpError("mmtp eval loss: name data sets of mmtp tokenize with --data")
    model = from_pretrained(name)
    if not isinstance(model, UnifiedModel):
        raise MmtpError(f"{name}: is a {type(model).__name__}, not a unified model")
    found = evaluate_likelihood(model.eval(), [ShardDataset(folder) for folder in data], inputs=inputs, progress=bar)
    table = found.table(f"{name}: loss of {named(data)}, {found.documents:,} documents")
    return Measured(None, [table], found.to_dict())


def captions(
    name: str,
    tokenizers: Sequence[str] | None,
    bank: list[str] | None,
    data: list[str] | None,
    caption: str,
    size: str | None,
    limit: int | None,
    features: str | None,
    batch_size: int,
    bar: "Step",
) -> Measured:
    from mmtp.eval.captions import Captioned, evaluate_captions
    from mmtp.eval.features import FeatureNetwork
    from mmtp.pipeline import Pipeline

    bank, data = _bank(bank, data, "captions")
    parts = [_labelled(sources, ["caption"], caption, size, limit, bar) for sources in (bank, data)]
    known, held_out = (Captioned(pictures, said) for pictures, said, _ in parts)
    network = FeatureNetwork.load(features) if features else None
    look = (lambda pictures: network.pooled(list(pictures))) if network else None
    result = evaluate_captions(Pipeline.from_pretrained(name, tokenizers=tokenizers), held_out, known, look=look, batch_size=batch_size)
    by = f"features of {network.name}" if network else "pixels"
    return Measured(result.f1(), [result.table(f"{name}: captions of {named(data)}; the nearest by {by}")], result.to_dict())


def pictures(
    name: str,
    tokenizers: Sequence[str] | None,
    bank: list[str] | None,
    data: list[str] | None,
    labels: list[str] | None,
    caption: str,
    size: str | None,
    limit: int | None,
    features: str | None,
    sampling: "Sampling",
    candidates: int,
    max_tokens: int,
    bar: "Step",
) -> Measured:
    from mmtp.eval.features import FeatureNetwork
    from mmtp.eval.likeness import Judged, evaluate_likeness
    from mmtp.pipeline import Pipeline
    from mmtp.types import Modality

    bank, data = _bank(bank, data, "pictures")
    labels = labels or ["caption"]
    known, held_out = (
        Judged(pictures, prompts, {label: [str(each[label]) for each in known] for label in labels})
        for pictures, prompts, known in (_labelled(part, labels, caption, size, limit, bar) for part in (bank, data))
    )
    network = FeatureNetwork.load(features or "efficientnet-lite0")
    pipeline = Pipeline.from_pretrained(name, tokenizers=tokenizers)
    result = evaluate_likeness(
        pipeline,
        pipeline.tokenizer(Modality.IMAGE),
        network,
        held_out,
        known,
        sampling=sampling,
        candidates=candidates,
        max_new_tokens=max_tokens,
        progress=bar,
    )
    settings = {key: getattr(sampling, key) for key in ("temperature", "top_k", "top_p", "guidance")} | {"candidates": candidates}
    said = ", ".join(f"{key.replace('_', '-')} {value:g}" for key, value in settings.items())
    table = result.table(f"{name}: labels that a classifier on {network.name} reads in drawings of {named(data)}; {said}")
    shown = [result.pictures(f"Drawn from held-out captions, seeds 0 to {len(result.prompts) - 1}.")]
    return Measured(result.shares["drawn"][labels[0]], [table], {**result.to_dict(), **settings}, shown)


def speech(
    name: str,
    tokenizers: Sequence[str] | None,
    data: list[str] | None,
    limit: int | None,
    words: bool,
    sampling: "Sampling",
    candidates: int,
    at_once: int,
    word_by_word: bool,
    batch_size: int,
    bar: "Step",
) -> Measured:
    from mmtp.eval.inputs import Inputs
    from mmtp.eval.speech import Recognizer
    from mmtp.eval.spoken import MODEL, SPOKEN, evaluate_spoken
    from mmtp.pipeline import Pipeline
    from mmtp.types import MmtpError, Modality

    if not data:
        raise MmtpError("mmtp eval speech: name recordings with their words to measure on (--data)")
    pipeline = Pipeline.from_pretrained(name, tokenizers=tokenizers)
    tokenizer = pipeline.tokenizer(Modality.AUDIO)
    inputs = Inputs(data, Modality.AUDIO, limit, bar)
    recordings = [recording for recording in inputs.recordings(tokenizer.spec.sample_rate) if recording.text]
    if not recordings:
        raise MmtpError(f"{named(data)}: no recording has a text")
    listen = Recognizer() if words else None
    chosen: dict[str, Any] = {"candidates": candidates, "at_once": at_once, "word_by_word": word_by_word}
    result = evaluate_spoken(pipeline, tokenizer, recordings, listen, sampling=sampling, batch_size=batch_size, **chosen)
    settings = {key: getattr(sampling, key) for key in ("temperature", "top_k", "top_p", "guidance", "seed")} | chosen
    errors = (result.said[SPOKEN] if words else result.heard[MODEL]).rate
    headline = None if errors is None else 1 - errors
    return Measured(headline, result.tables(f"{name} on {named(data)}"), {**result.to_dict(), **settings, **inputs.counts()})


def text(name: str, data: list[str], limit: int | None) -> Measured:
    from itertools import chain, islice

    from mmtp.data.texts import read_texts
    from mmtp.eval.compression import evaluate_text_tokenizer
    from mmtp.eval.report import Table
    from mmtp.hub import from_pretrained

    values = evaluate_text_tokenizer(from_pretrained(name), islice(chain.from_iterable(map(read_texts, data)), limit))
    rows = [[key.replace("_", " "), f"{value:,.0f}" if key == "texts" else f"{value:.4g}"] for key, value in values.items()]
    return Measured(values["exact"], [Table(["figure", "value"], rows, f"{name} on {named(data)}")], dict(values))


def _bank(bank: list[str] | None, data: list[str] | None, what: str) -> tuple[list[str], list[str]]:
    from mmtp.types import MmtpError

    if not bank or not data:
        raise MmtpError(f"mmtp eval {what}: name pictures to compare with (--bank) and others to measure on (--data)")
    return bank, data


def _labelled(
    sources: list[str], labels: list[str], wording: str, size: str | None, limit: int | None, bar: "Step"
) -> "tuple[Tensor, tuple[str, ...], list[dict[str, Any]]]":
    """Pictures of some sources that have all labels and those of a wording, with their captions so worded."""
    import torch

    from mmtp.cli.tokenize import parse_size
    from mmtp.data.labels import check_wording, word
    from mmtp.eval.inputs import Inputs
    from mmtp.types import MmtpError

    check_wording(wording)
    found = [
        (picture, said, known)
        for picture, known in Inputs(sources, limit=limit, progress=bar).labelled(labels, parse_size(size or "64"))
        if (said := word(wording, known))
    ]
    if not found:
        raise MmtpError(f"{named(sources)}: no picture has the labels {', '.join(labels)} and those of {wording!r}")
    pictures, said, known = zip(*found, strict=True)
    return torch.stack(pictures), said, list(known)


def named(data: list[str]) -> str:
    return " + ".join(data)
