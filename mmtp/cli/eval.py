"""``mmtp eval``: figures of tokenizers and models, with controls, and a threshold for scripts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from mmtp.cli.tables import Step
    from mmtp.decode.sample import Sampling
    from mmtp.eval.report import Section, Table
    from mmtp.tokenizers.base import DiscreteTokenizer

What = Literal["vqa", "draw", "tokenizer", "features", "text", "parser"]


class Measured(NamedTuple):
    """What a measurement gives.

    Attributes:
        headline: the figure that ``--at-least`` looks at: a share from 0 to 1, dB for picture tokenizers, STOI for those of sound;
            None where it could not be measured.
        tables: for people.
        values: for machines.
        figures: for a report.
    """

    headline: float | None
    tables: "list[Table]"
    values: dict[str, Any]
    figures: "Sequence[Section]" = ()


def eval(
    what: What,
    name: str | None = None,
    /,
    *,
    data: str | None = None,
    size: str | None = None,
    limit: int | None = None,
    seeds: int = 10,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    candidates: int = 1,
    max_tokens: int = 512,
    controls: bool = True,
    codecs: bool = False,
    words: bool = False,
    bank: str | None = None,
    label: str = "caption",
    teachers: Path | None = None,
    report: Path | None = None,
    batch_size: int = 64,
    json: Path | None = None,
    at_least: float | None = None,
) -> int:
    """Measure a tokenizer or a model.

    vqa: answers to easy-VQA's test questions, beside the same questions without a picture, with another picture, and the
    commonest answer. draw: all colours and shapes drawn from words, judged by a parser. parser: that parser on real pictures.
    tokenizer: pictures or recordings, as the tokenizer wants, through it and back. features: labels of held-out pictures, read from what a
    continuous picture tokenizer gives, beside the same tokenizer untrained and its teachers. text: texts through a text tokenizer and back.

    The exit code is 1 where the figure stays below --at-least.

    Args:
        what: vqa, draw, parser, tokenizer, features or text.
        name: zoo entry, folder or Hub id of the model or tokenizer; none for parser.
        data: what to measure on: easy-vqa:test, a folder, *.tar, ...; a tokenizer of sound needs one; for text: a source with
            captions or questions, or python:MODULE.
        size: bring pictures to this size first (64, or 96x64).
        limit: only so many questions, pictures, recordings or texts.
        seeds: pictures drawn per colour and shape.
        temperature: of drawing.
        top_k: draw with so many of the most probable codes; 0 with all.
        top_p: draw with the most probable codes that make up this share.
        guidance: scale of classifier-free guidance of drawing; 1 is off.
        candidates: draw so many pictures for one and let the model keep that in which it best reads the caption.
        max_tokens: limit of a drawing's tokens; one that is not finished by then is wrong.
        controls: leave out the questions without a picture and with another one.
        codecs: put the tokenizer beside codecs at equal and at twice the bytes, container included: JPEG, WebP and AVIF, or Opus and
            Codec2.
        words: word errors of Whisper tiny.en on recordings with an English text: original, reconstruction, and codecs where asked for.
        bank: of features: labelled pictures to compare with and to fit on, a source as for --data.
        label: of features: which label of the pictures (group, caption).
        teachers: of features: the recipe whose teachers are measured beside.
        report: write the tables, the plots beside codecs, and the first recordings, to this HTML file.
        batch_size: questions at a time.
        json: write the figures to this file.
        at_least: threshold: share of right answers, pictures, nearest labels or exact texts (0.98), mean PSNR in dB for
            tokenizers of pictures, mean STOI (0 to 1) for those of sound.

    Examples:
        mmtp eval vqa vqa-s --at-least 0.98
        mmtp eval draw vqa-s --seeds 10 --json drawings.json
        mmtp eval draw vqa-s --top-k 20 --candidates 8
        mmtp eval parser
        mmtp eval tokenizer image-fsq-f8 --data easy-vqa:test --at-least 30
        mmtp eval tokenizer image-fsq-f8 --data emoji-val.tar --size 64 --codecs --report emoji.html
        mmtp eval tokenizer runs/speech/result --data prompts-en-val.tar --words --codecs --report speech.html
        mmtp eval features runs/vit-distilled/result --bank emoji-train.tar --data emoji-val.tar --label group
        mmtp eval text text-bpe-4k --data python:pydoc_data.topics
    """
    from mmtp.cli import CHECK_FAILED
    from mmtp.cli.tables import progress_bar, show
    from mmtp.decode.sample import Sampling
    from mmtp.types import MmtpError

    if (name is None) != (what == "parser"):
        raise MmtpError(f"mmtp eval {what}: " + ("takes no name" if name else "name a zoo entry, a folder or a Hub id"))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
    measure: dict[str, Callable[[Step], Measured]] = {
        "vqa": lambda bar: _vqa(str(name), limit, controls, batch_size, bar),
        "draw": lambda bar: _draw(str(name), seeds, sampling, candidates, max_tokens, bar),
        "parser": lambda bar: _parser(data or "easy-vqa:test", limit, bar),
        "tokenizer": lambda bar: _tokenizer(str(name), data, size, limit, codecs, words, bar),
        "features": lambda bar: _features(str(name), bank, data, label, size, limit, teachers, bar),
        "text": lambda bar: _text(str(name), data or "easy-vqa:test", limit),
    }
    with progress_bar(f"eval {what}", {"vqa": "answers", "tokenizer": "items"}.get(what, "pictures")) as bar:
        measured = measure[what](bar)
    show(*(table.rich() for table in measured.tables))
    if json is not None:
        write_json(json, {"eval": what, "name": name, "headline": measured.headline, **measured.values})
    if report is not None:
        from mmtp.eval.report import write_report

        print(write_report(report, f"mmtp eval {what} {name or ''}".strip(), [*measured.tables, *measured.figures]))
    if at_least is None:
        return 0
    if measured.headline is None:
        raise MmtpError("--at-least: the figure that it looks at could not be measured; the table says why")
    if measured.headline < at_least:
        print(f"below the threshold: {measured.headline:.4g} < {at_least:g}")
        return CHECK_FAILED
    return 0


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes figures with the version that measured them."""
    import json

    from mmtp import __version__
    from mmtp.hub import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"mmtp": __version__, **values}, indent=2) + "\n")


def _vqa(name: str, limit: int | None, controls: bool, batch_size: int, bar: "Step") -> Measured:
    from mmtp.eval.vqa import easy_vqa_prior, easy_vqa_samples, evaluate
    from mmtp.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(name)
    samples = easy_vqa_samples("test", limit)
    result = evaluate(pipeline, samples, prior=easy_vqa_prior(), controls=controls, batch_size=batch_size, progress=bar)
    return Measured(result.accuracy, [result.table(f"{name}: easy-VQA, test questions answered right")], result.to_dict())


def _draw(name: str, seeds: int, sampling: "Sampling", candidates: int, max_tokens: int, bar: "Step") -> Measured:
    from mmtp.eval.generation import evaluate
    from mmtp.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(name)
    result = evaluate(pipeline, seeds=seeds, sampling=sampling, candidates=candidates, max_new_tokens=max_tokens, progress=bar)
    settings = {key: getattr(sampling, key) for key in ("temperature", "top_k", "top_p", "guidance")} | {"candidates": candidates}
    said = ", ".join(f"{key.replace('_', '-')} {value:g}" for key, value in settings.items())
    table = result.table(f"{name}: pictures drawn right, {seeds} of each; {said}")
    return Measured(result.accuracy, [table], {**result.to_dict(), **settings})


def _parser(data: str, limit: int | None, bar: "Step") -> Measured:
    from mmtp.eval.generation import judge, labelled_pictures

    result = judge(labelled_pictures(data, limit), progress=bar)
    return Measured(result.accuracy, [result.table(f"parser: real pictures of {data} read right")], result.to_dict())


def _tokenizer(name: str, data: str | None, size: str | None, limit: int | None, codecs: bool, words: bool, bar: "Step") -> Measured:
    from mmtp.hub import from_pretrained
    from mmtp.types import MmtpError, Modality

    tokenizer = from_pretrained(name)
    match tokenizer.spec.modality:
        case Modality.IMAGE if words:
            raise MmtpError("--words: there are none in pictures")
        case Modality.IMAGE:
            return _pictures(tokenizer, name, data or "easy-vqa:test", size, limit, codecs, bar)
        case Modality.AUDIO if size:
            raise MmtpError("--size: sounds have none")
        case Modality.AUDIO:
            if data is None:
                raise MmtpError(f"{name}: is a tokenizer of sound; name recordings: --data FOLDER or *.tar")
            return _sounds(tokenizer, name, data, limit, codecs, words, bar)
        case other:
            raise MmtpError(
                f"{name}: is a tokenizer of {other}" + ("; see mmtp eval text" if other is Modality.TEXT else ", which is not measured")
            )


def _pictures(
    tokenizer: "DiscreteTokenizer", name: str, data: str, size: str | None, limit: int | None, codecs: bool, bar: "Step"
) -> Measured:
    from collections.abc import Iterator

    from torch import Tensor

    from mmtp.cli.tokenize import parse_size
    from mmtp.data.errors import DecodeError
    from mmtp.data.media import decode_image
    from mmtp.data.sources import open_source
    from mmtp.eval.generation import judge, labelled_pictures
    from mmtp.eval.reconstruction import evaluate_tokenizer
    from mmtp.eval.report import Table

    source = open_source(data)
    items = source.items()[:limit]
    unreadable: list[str] = []
    frame = parse_size(size) if size else None
    kept: list[Recording] = []  # only for the comparison, which reads them once per setting

    def pictures() -> Iterator[Tensor]:
        for done, item in enumerate(items, start=1):
            try:
                picture = decode_image(source.read(item).media, size=frame)
            except DecodeError as error:
                unreadable.append(f"{item.key}: {error}")
            else:
                if codecs:
                    kept.append(picture)
                yield picture
            bar(done, len(items))

    values = evaluate_tokenizer(tokenizer, pictures())
    rows = [[key.replace("_", " "), f"{value:,.0f}" if key in ("images", "tokens") else f"{value:.4g}"] for key, value in values.items()]
    if unreadable:
        rows.append(["unreadable, left out", f"{len(unreadable)} (the first: {unreadable[0]})"])
    if data.startswith("easy-vqa"):
        values["parsed_right"] = judge(labelled_pictures(data, limit), tokenizer).accuracy
        rows.append(["share that the parser reads right", f"{values['parsed_right']:.4g}"])
    tables, figures = [Table(["figure", "value"], rows, f"{name} on {data}")], []
    found: dict[str, Any] = values | {"unreadable": len(unreadable)}
    if codecs:
        from mmtp.eval.rate import compare_rates

        rates = compare_rates(tokenizer, name, kept, progress=bar)
        tables.append(rates.table(f"{name} and codecs on {data}, means per picture, container included"))
        figures.append(rates.figure("Each codec at qualities from 0 to 90; the dot is the tokenizer."))
        found["rates"] = rates.to_dict()
    return Measured(values["psnr"], tables, found, figures)


def _sounds(tokenizer: "DiscreteTokenizer", name: str, data: str, limit: int | None, codecs: bool, words: bool, bar: "Step") -> Measured:
    from collections.abc import Iterator

    from mmtp.data.errors import DecodeError
    from mmtp.data.media import decode_sound
    from mmtp.data.sources import open_source
    from mmtp.eval.sound import Recording, evaluate_sound_tokenizer
    from mmtp.eval.speech import Recognizer
    from mmtp.types import Modality

    rate = tokenizer.spec.sample_rate
    source = open_source(data, Modality.AUDIO)
    items = source.items()[:limit]
    unreadable: list[str] = []
    kept: list[Recording] = []  # only for the comparison, which reads them once per setting

    def recordings() -> Iterator[Recording]:
        for done, item in enumerate(items, start=1):
            try:
                sample = source.read(item)
                sound, _ = decode_sound(sample.media, sample_rate=rate)
            except DecodeError as error:
                unreadable.append(f"{item.key}: {error}")
            else:
                recording = Recording(sound, sample.labels.get("caption"))
                if codecs:
                    kept.append(recording)
                yield recording
            bar(done, len(items))

    recognizer = Recognizer() if words else None
    result = evaluate_sound_tokenizer(tokenizer, recordings(), recognizer)
    extra = [("unreadable, left out", f"{len(unreadable)} (the first: {unreadable[0]})")] if unreadable else []
    tables = result.tables(f"{name} on {data}", extra)
    figures: list[Section] = [result.examples] if result.examples else []
    found: dict[str, Any] = result.to_dict() | {"unreadable": len(unreadable)}
    if codecs:
        from mmtp.eval.sound_rate import compare_sound_rates

        rates = compare_sound_rates(result, name, kept, int(rate or 0), recognizer, progress=bar)
        tables.append(rates.table(f"{name} and codecs on {data}, means over recordings, container included"))
        figures += [rates.figure("Each codec at its settings; the dot is the tokenizer.", measure) for measure in ("stoi", "mel")]
        found["rates"] = rates.to_dict()
    return Measured(result.headline, tables, found, figures)


def _features(
    name: str, bank: str | None, data: str | None, label: str, size: str | None, limit: int | None, teachers: Path | None, bar: "Step"
) -> Measured:
    from collections.abc import Iterator
    from dataclasses import asdict

    import torch
    from torch import Tensor

    from mmtp.cli.tokenize import parse_size
    from mmtp.config import from_dict, load_file
    from mmtp.data.errors import DecodeError
    from mmtp.data.media import decode_image
    from mmtp.data.sources import open_source
    from mmtp.eval.probes import Labelled, probe, probe_table, retrieval
    from mmtp.eval.report import Table
    from mmtp.hub import find, from_pretrained
    from mmtp.models.teachers import Teacher, TeacherConfig
    from mmtp.types import MmtpError

    if bank is None or data is None:
        raise MmtpError("mmtp eval features: name pictures to compare with (--bank) and others to measure on (--data)")
    frame = parse_size(size or "64")

    def samples(place: str) -> Iterator[tuple[Tensor, str, str]]:
        source = open_source(place)
        items = source.items()[:limit]
        for done, item in enumerate(items, start=1):
            try:
                sample = source.read(item)
                if value := sample.labels.get(label):
                    yield decode_image(sample.media, size=frame), str(value), sample.labels.get("caption", "")
            except DecodeError:
                pass
            bar(done, len(items))

    known: list[Teacher] = []
    if teachers is not None:
        recipe = load_file(teachers / "recipe.toml" if teachers.is_dir() else teachers)
        tables = recipe.get("loss", {}).get("distill", {}).get("teachers", [])
        known = [Teacher(from_dict(TeacherConfig, table, "loss.distill.teachers"), Path(), torch.device("cpu")) for table in tables]
    held_out = Labelled.of(samples(data))
    tokenizer = from_pretrained(name)
    found = probe(tokenizer, name, Labelled.of(samples(bank)), held_out, known)
    tables = [probe_table(found, f"{name}: {label} of {data}, as the features tell; {len(held_out.labels):,} pictures")]
    values: dict[str, Any] = {"pictures": len(held_out.labels), "features": [asdict(p) for p in found]}
    if (towers := find(name) / "towers").is_dir():
        recalls = values["retrieval"] = retrieval(tokenizer, from_pretrained(towers), held_out)
        rows = [[key.replace("_", " "), f"{value:,.0f}" if value > 1 else f"{value:.3f}"] for key, value in recalls.items()]
        tables.append(Table(["recall", "value"], rows, f"{name}: pictures and captions of {data} find each other"))
    return Measured(found[0].neighbours, tables, values)


def _text(name: str, data: str, limit: int | None) -> Measured:
    from itertools import islice

    from mmtp.data.texts import read_texts
    from mmtp.eval.compression import evaluate_text_tokenizer
    from mmtp.eval.report import Table
    from mmtp.hub import from_pretrained

    values = evaluate_text_tokenizer(from_pretrained(name), islice(read_texts(data), limit))
    rows = [[key.replace("_", " "), f"{value:,.0f}" if key == "texts" else f"{value:.4g}"] for key, value in values.items()]
    return Measured(values["exact"], [Table(["figure", "value"], rows, f"{name} on {data}")], dict(values))
