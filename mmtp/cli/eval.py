"""``mmtp eval``: figures of tokenizers and models, with controls, and a threshold for scripts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from mmtp.cli.tables import Step
    from mmtp.decode.sample import Sampling
    from mmtp.eval.report import Section, Table
    from mmtp.tokenizers.base import DiscreteTokenizer

What = Literal["vqa", "draw", "tokenizer", "probe", "text", "parser"]

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


class Reconstruction(NamedTuple):
    """What of the command line speaks of tokenizers of media; ``curves`` is whether there will be plots."""

    data: list[str] | None
    size: str | None
    crop: str | None
    limit: int | None
    codecs: bool
    features: str | None
    words: bool
    usage: bool
    curves: bool


def eval(
    what: What,
    name: str | None = None,
    /,
    *,
    data: list[str] | None = None,
    size: str | None = None,
    crop: str | None = None,
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
    features: str | None = None,
    words: bool = False,
    bank: list[str] | None = None,
    label: str = "caption",
    teachers: Path | None = None,
    usage: bool = False,
    report: Path | None = None,
    batch_size: int = 64,
    json: Path | None = None,
    at_least: float | None = None,
) -> int:
    """Measure a tokenizer or a model.

    vqa: answers to easy-VQA's test questions, beside the same questions without a picture, with another picture, and the
    commonest answer. draw: all colours and shapes drawn from words, judged by a parser. parser: that parser on real pictures.
    tokenizer: pictures, videos or recordings, as the tokenizer wants, through it and back. probe: labels of held-out pictures, read from
    what a continuous picture tokenizer gives, beside the same tokenizer untrained and its teachers. text: texts through a text tokenizer
    and back.

    The exit code is 1 where the figure stays below --at-least.

    Args:
        what: vqa, draw, parser, tokenizer, probe or text.
        name: zoo entry, folder or Hub id of the model or tokenizer; none for parser.
        data: what to measure on: easy-vqa:test, a folder, *.tar, ...; a tokenizer of sound or videos needs one; for text: a source with
            captions or questions, or python:MODULE. May be given several times: all of them together.
        size: bring pictures and frames to this size first (64, or 96x64).
        crop: then cut each picture into as many crops of this size (256, or 384x256) as lie side by side around its middle, without
            overlap; pictures that are smaller are left out and counted.
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
        features: perceptual and Fréchet distance of pictures in the features of this network: efficientnet-lite0 or -lite2, timm:NAME, or
            timm:NAME:FILE with a local file of weights.
        words: word errors of Whisper tiny.en on recordings with an English text: original, reconstruction, and codecs where asked for.
        bank: of probe: labelled pictures to compare with and to fit on, sources as for --data.
        label: of probe: which label of the pictures (group, caption).
        teachers: of probe: the recipe whose teachers are measured beside.
        usage: only count the codes that a tokenizer uses, over the whole set; nothing is decoded, which is several times quicker.
        report: write the tables, the plots beside codecs (for which these are measured at all qualities, which takes longer), and the
            first recordings, to this HTML file.
        batch_size: questions at a time.
        json: write the figures to this file.
        at_least: threshold: share of right answers, pictures, nearest labels or exact texts (0.98), mean PSNR in dB for
            tokenizers of pictures and videos, mean STOI (0 to 1) for those of sound; with --usage the share of its entries that the
            least used codebook uses.

    Examples:
        mmtp eval vqa vqa-s --at-least 0.98
        mmtp eval draw vqa-s --seeds 10 --json drawings.json
        mmtp eval draw vqa-s --top-k 20 --candidates 8
        mmtp eval parser
        mmtp eval tokenizer image-fsq-f8 --data easy-vqa:test --at-least 30
        mmtp eval tokenizer image-fsq-f8 --data emoji-val.tar --size 64 --codecs --report emoji.html
        mmtp eval tokenizer image-fsq-f8 --data photos-val.tar --crop 256 --codecs --features efficientnet-lite0
        mmtp eval tokenizer image-fsq-f8 --data emoji-train.tar --data photos-train.tar --size 64 --usage --at-least 0.95
        mmtp eval tokenizer runs/speech/result --data prompts-en-val.tar --words --codecs --report speech.html
        mmtp eval probe runs/vit-distilled/result --bank emoji-train.tar --data emoji-val.tar --label group
        mmtp eval text text-bpe-4k --data python:pydoc_data.topics
    """
    from mmtp.cli import CHECK_FAILED
    from mmtp.cli.tables import progress_bar, show
    from mmtp.decode.sample import Sampling
    from mmtp.types import MmtpError

    if (name is None) != (what == "parser"):
        raise MmtpError(f"mmtp eval {what}: " + ("takes no name" if name else "name a zoo entry, a folder or a Hub id"))
    how = Reconstruction(data, size, crop, limit, codecs, features, words, usage, report is not None)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
    measure: dict[str, Callable[[Step], Measured]] = {
        "vqa": lambda bar: _vqa(str(name), limit, controls, batch_size, bar),
        "draw": lambda bar: _draw(str(name), seeds, sampling, candidates, max_tokens, bar),
        "parser": lambda bar: _parser(data or [EASY_VQA], limit, bar),
        "tokenizer": lambda bar: _tokenizer(str(name), how, bar),
        "probe": lambda bar: _probe(str(name), bank, data, label, size, limit, teachers, bar),
        "text": lambda bar: _text(str(name), data or [EASY_VQA], limit),
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


def _parser(data: list[str], limit: int | None, bar: "Step") -> Measured:
    from mmtp.eval.generation import judge, labelled_pictures

    samples = [sample for source in data for sample in labelled_pictures(source, limit)][:limit]
    result = judge(samples, progress=bar)
    return Measured(result.accuracy, [result.table(f"parser: real pictures of {_named(data)} read right")], result.to_dict())


def _tokenizer(name: str, how: Reconstruction, bar: "Step") -> Measured:
    from mmtp.hub import from_pretrained
    from mmtp.types import MmtpError, Modality

    tokenizer = from_pretrained(name)
    others = {"--codecs": how.codecs, "--features": how.features, "--words": how.words}
    if how.usage and (asked := [option for option, value in others.items() if value]):
        raise MmtpError(f"--usage: decodes nothing, so that {asked[0]} has nothing to measure; leave one of them out")
    match tokenizer.spec.modality:
        case Modality.IMAGE | Modality.VIDEO if how.words:
            raise MmtpError("--words: there are none in pictures and videos")
        case Modality.IMAGE:
            return (_usage if how.usage else _pictures)(tokenizer, name, how, bar)
        case Modality.VIDEO:
            for option, value in {"--codecs": how.codecs, "--crop": how.crop, "--features": how.features, "--usage": how.usage}.items():
                if value:
                    raise MmtpError(f"{option}: is not for tokenizers of videos, and {name} is one")
            if how.data is None:
                raise MmtpError(f"{name}: is a tokenizer of videos; name some: --data FOLDER or *.tar")
            return _videos(tokenizer, name, how, bar)
        case Modality.AUDIO:
            for option, value in {"--size": how.size, "--crop": how.crop, "--features": how.features}.items():
                if value:
                    raise MmtpError(f"{option}: is for pictures; {name} is a tokenizer of sound")
            if how.data is None:
                raise MmtpError(f"{name}: is a tokenizer of sound; name recordings: --data FOLDER or *.tar")
            return (_usage if how.usage else _sounds)(tokenizer, name, how, bar)
        case other:
            raise MmtpError(
                f"{name}: is a tokenizer of {other}" + ("; see mmtp eval text" if other is Modality.TEXT else ", which is not measured")
            )


def _usage(tokenizer: "DiscreteTokenizer", name: str, how: Reconstruction, bar: "Step") -> Measured:
    from mmtp.eval.codes import count_codes
    from mmtp.eval.inputs import Inputs
    from mmtp.eval.report import Table
    from mmtp.types import Modality

    data, modality = how.data or [EASY_VQA], tokenizer.spec.modality
    inputs = Inputs(data, modality, how.limit, bar)
    if modality is Modality.IMAGE:
        counts = count_codes(tokenizer, inputs.pictures(*_frames(how)))
    else:
        counts = count_codes(tokenizer, (r.sound for r in inputs.recordings(int(tokenizer.spec.sample_rate or 0))), batch=1)
    tables = [counts.table(f"{name} on {_named(data)}: {counts.tokens:,} tokens")]
    if left_out := inputs.left_out():
        tables.append(Table(["", ""], left_out))
    found = {"tokens": counts.tokens, **counts.figures(), "codebooks": counts.codebooks(), **inputs.counts()}
    return Measured(min(counts.usages), tables, found)


def _pictures(tokenizer: "DiscreteTokenizer", name: str, how: Reconstruction, bar: "Step") -> Measured:
    from collections.abc import Iterator

    from torch import Tensor

    from mmtp.eval.features import FeatureNetwork
    from mmtp.eval.generation import judge, labelled_pictures
    from mmtp.eval.inputs import Inputs
    from mmtp.eval.reconstruction import evaluate_tokenizer

    network = FeatureNetwork.load(how.features) if how.features else None
    data = how.data or [EASY_VQA]
    inputs = Inputs(data, limit=how.limit, progress=bar)
    kept: list[Tensor] = []  # only for the comparison, which reads them once per setting

    def pictures() -> Iterator[Tensor]:
        for picture in inputs.pictures(*_frames(how)):
            if how.codecs:
                kept.append(picture)
            yield picture

    result = evaluate_tokenizer(tokenizer, pictures(), network)
    extra, found = inputs.left_out(), result.to_dict() | inputs.counts()
    if len(data) == 1 and data[0].startswith("easy-vqa"):
        found["parsed_right"] = judge(labelled_pictures(data[0], how.limit), tokenizer).accuracy
        extra.append(("share that the parser reads right", f"{found['parsed_right']:.4g}"))
    tables, figures = result.tables(f"{name} on {_named(data)}{_cut(how)}", extra), []
    if how.codecs:
        from mmtp.eval.rate import compare_rates

        rates = compare_rates(tokenizer, name, kept, network=network, curves=how.curves, progress=bar)
        said = "means per picture, container included; between its qualities a codec is read off a line over the logarithm of bytes"
        tables.append(rates.table(f"{name} and codecs on {_named(data)}{_cut(how)}, {said}"))
        figures += rates.figures(
            "Each codec at qualities from 0 to 90; the dots are the tokenizer, with fewer of its codebooks where it can."
        )
        found["rates"] = rates.to_dict()
    return Measured(result.headline, tables, found, figures)


def _videos(tokenizer: "DiscreteTokenizer", name: str, how: Reconstruction, bar: "Step") -> Measured:
    from mmtp.eval.inputs import Inputs
    from mmtp.eval.report import Table
    from mmtp.eval.video import evaluate_video_tokenizer
    from mmtp.types import Modality

    data = how.data or []
    inputs = Inputs(data, Modality.VIDEO, how.limit, bar)
    values = evaluate_video_tokenizer(tokenizer, inputs.videos(tokenizer.spec.sample_rate, _frames(how)[0]))
    whole = ("videos", "frames", "tokens")
    rows = [[key.replace("_", " "), f"{value:,.0f}" if key in whole else f"{value:.4g}"] for key, value in values.items()]
    rows += [list(row) for row in inputs.left_out()]
    return Measured(values["psnr"], [Table(["figure", "value"], rows, f"{name} on {_named(data)}")], values | inputs.counts())


def _sounds(tokenizer: "DiscreteTokenizer", name: str, how: Reconstruction, bar: "Step") -> Measured:
    from collections.abc import Iterator

    from mmtp.eval.inputs import Inputs
    from mmtp.eval.sound import Recording, evaluate_sound_tokenizer
    from mmtp.eval.speech import Recognizer
    from mmtp.types import Modality

    data = how.data or []
    inputs = Inputs(data, Modality.AUDIO, how.limit, bar)
    kept: list[Recording] = []  # only for the comparison, which reads them once per setting

    def recordings() -> Iterator[Recording]:
        for recording in inputs.recordings(int(tokenizer.spec.sample_rate or 0)):
            if how.codecs:
                kept.append(recording)
            yield recording

    recognizer = Recognizer() if how.words else None
    result = evaluate_sound_tokenizer(tokenizer, recordings(), recognizer)
    tables = result.tables(f"{name} on {_named(data)}", inputs.left_out())
    figures: list[Section] = [result.examples] if result.examples else []
    found: dict[str, Any] = result.to_dict() | inputs.counts()
    if how.codecs:
        from mmtp.eval.sound_rate import compare_sound_rates

        rates = compare_sound_rates(tokenizer, result, name, kept, recognizer, progress=bar)
        tables.append(rates.table(f"{name} and codecs on {_named(data)}, means over recordings, container included"))
        figures += rates.figures("Each codec at its settings; the dots are the tokenizer, with fewer of its codebooks where it can.")
        found["rates"] = rates.to_dict()
    return Measured(result.headline, tables, found, figures)


def _probe(
    name: str,
    bank: list[str] | None,
    data: list[str] | None,
    label: str,
    size: str | None,
    limit: int | None,
    teachers: Path | None,
    bar: "Step",
) -> Measured:
    from dataclasses import asdict

    import torch

    from mmtp.cli.tokenize import parse_size
    from mmtp.config import from_dict, load_file
    from mmtp.eval.inputs import Inputs
    from mmtp.eval.probes import Labelled, probe, probe_table, retrieval
    from mmtp.eval.report import Table
    from mmtp.hub import find, from_pretrained
    from mmtp.models.teachers import Teacher, TeacherConfig
    from mmtp.types import MmtpError

    if not bank or not data:
        raise MmtpError("mmtp eval probe: name pictures to compare with (--bank) and others to measure on (--data)")
    known: list[Teacher] = []
    if teachers is not None:
        recipe = load_file(teachers / "recipe.toml" if teachers.is_dir() else teachers)
        tables = recipe.get("loss", {}).get("distill", {}).get("teachers", [])
        known = [Teacher(from_dict(TeacherConfig, table, "loss.distill.teachers"), Path(), torch.device("cpu")) for table in tables]
    frame = parse_size(size or "64")
    fitted_on, held_out = (Labelled.of(Inputs(part, limit=limit, progress=bar).labelled(label, frame)) for part in (bank, data))
    tokenizer = from_pretrained(name)
    found = probe(tokenizer, name, fitted_on, held_out, known)
    shown = [probe_table(found, f"{name}: {label} of {_named(data)}, as the features tell; {len(held_out.labels):,} pictures")]
    values: dict[str, Any] = {"pictures": len(held_out.labels), "features": [asdict(p) for p in found]}
    if (towers := find(name) / "towers").is_dir():
        recalls = values["retrieval"] = retrieval(tokenizer, from_pretrained(towers), held_out)
        rows = [[key.replace("_", " "), f"{value:,.0f}" if "@" not in key else f"{value:.3f}"] for key, value in recalls.items()]
        shown.append(Table(["recall", "value"], rows, f"{name}: pictures and captions of {_named(data)} find each other"))
    return Measured(found[0].neighbours, shown, values)


def _text(name: str, data: list[str], limit: int | None) -> Measured:
    from itertools import chain, islice

    from mmtp.data.texts import read_texts
    from mmtp.eval.compression import evaluate_text_tokenizer
    from mmtp.eval.report import Table
    from mmtp.hub import from_pretrained

    values = evaluate_text_tokenizer(from_pretrained(name), islice(chain.from_iterable(map(read_texts, data)), limit))
    rows = [[key.replace("_", " "), f"{value:,.0f}" if key == "texts" else f"{value:.4g}"] for key, value in values.items()]
    return Measured(values["exact"], [Table(["figure", "value"], rows, f"{name} on {_named(data)}")], dict(values))


def _frames(how: Reconstruction) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """(height, width) that pictures are brought to, and that of the crops they are cut into."""
    from mmtp.cli.tokenize import parse_size

    return how.size and parse_size(how.size), how.crop and parse_size(how.crop, "--crop")  # pyrefly: ignore


def _named(data: list[str]) -> str:
    return " + ".join(data)


def _cut(how: Reconstruction) -> str:
    """What was done to pictures, in words."""
    return (f", at {how.size}" if how.size else "") + (f", crops of {how.crop}" if how.crop else "")
