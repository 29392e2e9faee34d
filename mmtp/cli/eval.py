"""``mmtp eval``: figures of tokenizers and models, with controls, and a threshold for scripts."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mmtp.cli.measure import Measured
    from mmtp.cli.tables import Step

What = Literal["vqa", "draw", "captions", "pictures", "speech", "loss", "tokenizer", "probe", "text", "parser"]


def eval(
    what: What,
    name: str | None = None,
    /,
    *,
    tokenizer: list[str] | None = None,
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
    at_once: int = 0,
    word_by_word: bool = False,
    max_tokens: int = 512,
    controls: bool = True,
    codecs: bool = False,
    features: str | None = None,
    words: bool = False,
    bank: list[str] | None = None,
    label: list[str] | None = None,
    caption: str = "{caption}",
    teachers: Path | None = None,
    inputs: list[str] | None = None,
    usage: bool = False,
    report: Path | None = None,
    batch_size: int = 64,
    json: Path | None = None,
    at_least: float | None = None,
) -> int:
    """Measure a tokenizer or a model.

    vqa: answers to easy-VQA's test questions, beside the same questions without a picture, with another picture, and the
    commonest answer. draw: all colours and shapes drawn from words, judged by a parser. parser: that parser on real pictures.
    captions: words for held-out pictures, by token F1, beside those for another picture, of the nearest known picture, and the best
    constant. pictures: drawings of held-out captions, judged by a classifier of real pictures, beside real and reconstructed ones.
    speech: word errors of what a model writes down of held-out recordings and, with --words, of what Whisper hears it say.
    loss: cross-entropy of held-out shards of mmtp tokenize by medium, and how far drafts agree with the model.
    tokenizer: pictures, videos or recordings, as the tokenizer wants, through it and back. probe: labels of held-out pictures, read from
    what a continuous picture tokenizer gives, beside the same tokenizer untrained and its teachers. text: texts through a text tokenizer
    and back.

    The exit code is 1 where the figure stays below --at-least.

    Args:
        what: vqa, draw, captions, pictures, speech, loss, parser, tokenizer, probe or text.
        name: zoo entry, folder or Hub id of the model or tokenizer; none for parser.
        tokenizer: of models that read or write media and words: a zoo entry, folder or Hub id, where the model was trained with one that
            the zoo does not know under its name; may be given several times.
        data: what to measure on: easy-vqa:test, a folder, *.tar, ...; a tokenizer of sound or videos needs one; for text: a source with
            captions or questions, or python:MODULE; for loss: data sets of mmtp tokenize. May be given several times: all of them together.
        size: bring pictures and frames to this size first (64, or 96x64).
        crop: then cut each picture into as many crops of this size (256, or 384x256) as lie side by side around its middle, without
            overlap; pictures that are smaller are left out and counted.
        limit: only so many questions, pictures, recordings or texts.
        seeds: pictures drawn per colour and shape.
        temperature: of drawing.
        top_k: draw with so many of the most probable codes; 0 with all.
        top_p: draw with the most probable codes that make up this share.
        guidance: scale of classifier-free guidance of drawing; 1 is off.
        candidates: draw so many pictures for one, or say a text so often, and let the model keep that in which it best reads the words.
        at_once: of speech: words that the model says at once, at most; a text of more is said in parts, and these are joined. 0 for all.
        word_by_word: of speech: write each word before its sound, by turns, as models do that have learnt the task read.
        max_tokens: limit of a drawing's tokens; one that is not finished by then is wrong.
        controls: leave out the questions without a picture and with another one.
        codecs: put the tokenizer beside codecs at equal and at twice the bytes, container included: JPEG, WebP and AVIF, or Opus and
            Codec2.
        features: perceptual and Fréchet distance of pictures in the features of this network: efficientnet-lite0 or -lite2, timm:NAME, or
            timm:NAME:FILE with a local file of weights; of captions and pictures: the network that finds the nearest, or judges.
        words: word errors of Whisper tiny.en on recordings with an English text: original, reconstruction, and codecs where asked for; of
            speech: on what the model says as well.
        bank: of probe, captions and pictures: labelled pictures to compare with and to fit on, sources as for --data.
        label: of probe and pictures: which label of the pictures (group, caption); for pictures it may be given several times.
        caption: of captions and pictures: how they are worded, with labels in braces ("{caption}, {style} style").
        teachers: of probe: the recipe whose teachers are measured beside.
        inputs: of loss: media (text, image, ...) whose tokens count where they are input as well; given several times.
        usage: only count the codes that a tokenizer uses, over the whole set; nothing is decoded, which is several times quicker.
        report: write the tables, the plots beside codecs (for which these are measured at all qualities, which takes longer), and the
            first recordings, to this HTML file.
        batch_size: questions at a time.
        json: write the figures to this file.
        at_least: threshold: share of right answers, pictures, labels or exact texts (0.98), mean token F1 of captions, share of words
            without error that a model says (with --words) or hears, mean PSNR in dB for tokenizers of pictures and videos, mean STOI (0
            to 1) for those of sound; with --usage the share of its entries that the least used codebook uses.

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
        mmtp eval captions runs/emoji/result --bank emoji-train.tar --data emoji-val.tar
        mmtp eval pictures runs/emoji/result --bank emoji-train.tar --data emoji-val.tar --label group
        mmtp eval speech runs/speech/result --data prompts-en-val.tar --words
        mmtp eval loss runs/emoji/result --data runs/emoji-val
        mmtp eval text text-bpe-4k --data python:pydoc_data.topics
    """
    from mmtp.cli import CHECK_FAILED, measure, measure_tokenizer
    from mmtp.cli.tables import progress_bar, show
    from mmtp.decode.sample import Sampling
    from mmtp.types import MmtpError

    if (name is None) != (what == "parser"):
        raise MmtpError(f"mmtp eval {what}: " + ("takes no name" if name else "name a zoo entry, a folder or a Hub id"))
    how = measure_tokenizer.Reconstruction(data, size, crop, limit, codecs, features, words, usage, report is not None)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
    known, own = str(name), tokenizer
    measures: dict[str, Callable[[Step], Measured]] = {
        "vqa": lambda bar: measure.vqa(known, own, limit, controls, batch_size, bar),
        "draw": lambda bar: measure.draw(known, own, seeds, sampling, candidates, max_tokens, bar),
        "captions": lambda bar: measure.captions(known, own, bank, data, caption, size, limit, features, batch_size, bar),
        "pictures": lambda bar: measure.pictures(
            known, own, bank, data, label, caption, size, limit, features, sampling, candidates, max_tokens, bar
        ),
        "speech": lambda bar: measure.speech(known, own, data, limit, words, sampling, candidates, at_once, word_by_word, batch_size, bar),
        "loss": lambda bar: measure.loss(known, data, tuple(inputs or ()), bar),
        "parser": lambda bar: measure.parser(data or [measure.EASY_VQA], limit, bar),
        "tokenizer": lambda bar: measure_tokenizer.tokenizer(known, how, bar),
        "probe": lambda bar: measure.probe(known, bank, data, label, size, limit, teachers, bar),
        "text": lambda bar: measure.text(known, data or [measure.EASY_VQA], limit),
    }
    with progress_bar(
        f"eval {what}", {"vqa": "answers", "tokenizer": "items", "speech": "recordings", "loss": "rows"}.get(what, "pictures")
    ) as bar:
        measured = measures[what](bar)
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
