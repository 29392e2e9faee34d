"""What ``mmtp eval tokenizer`` measures: media through a tokenizer and back."""

from typing import TYPE_CHECKING, Any, NamedTuple

from mmtp.cli.measure import EASY_VQA, Measured, named

if TYPE_CHECKING:
    from mmtp.cli.tables import Step
    from mmtp.eval.report import Section
    from mmtp.tokenizers.base import DiscreteTokenizer


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


def tokenizer(name: str, how: Reconstruction, bar: "Step") -> Measured:
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
    tables = [counts.table(f"{name} on {named(data)}: {counts.tokens:,} tokens")]
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
    tables, figures = result.tables(f"{name} on {named(data)}{_cut(how)}", extra), []
    if how.codecs:
        from mmtp.eval.rate import compare_rates

        rates = compare_rates(tokenizer, name, kept, network=network, curves=how.curves, progress=bar)
        said = "means per picture, container included; between its qualities a codec is read off a line over the logarithm of bytes"
        tables.append(rates.table(f"{name} and codecs on {named(data)}{_cut(how)}, {said}"))
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
    return Measured(values["psnr"], [Table(["figure", "value"], rows, f"{name} on {named(data)}")], values | inputs.counts())


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
    tables = result.tables(f"{name} on {named(data)}", inputs.left_out())
    figures: list[Section] = [result.examples] if result.examples else []
    found: dict[str, Any] = result.to_dict() | inputs.counts()
    if how.codecs:
        from mmtp.eval.sound_rate import compare_sound_rates

        rates = compare_sound_rates(tokenizer, result, name, kept, recognizer, progress=bar)
        tables.append(rates.table(f"{name} and codecs on {named(data)}, means over recordings, container included"))
        figures += rates.figures("Each codec at its settings; the dots are the tokenizer, with fewer of its codebooks where it can.")
        found["rates"] = rates.to_dict()
    return Measured(result.headline, tables, found, figures)


def _frames(how: Reconstruction) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """(height, width) that pictures are brought to, and that of the crops they are cut into."""
    from mmtp.cli.tokenize import parse_size

    return how.size and parse_size(how.size), how.crop and parse_size(how.crop, "--crop")  # pyrefly: ignore


def _cut(how: Reconstruction) -> str:
    """What was done to pictures, in words."""
    return (f", at {how.size}" if how.size else "") + (f", crops of {how.crop}" if how.crop else "")
