"""How well a tokenizer of sound gives recordings back, and how much of its codebooks it uses, over a whole set."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mmtp.eval.codes import CodeCounts, EvalError
from mmtp.eval.distortion import Distortions, fit
from mmtp.eval.report import Sounds, Table
from mmtp.eval.speech import WordErrors
from mmtp.tokenizers.base import DiscreteTokenizer
from mmtp.types import Codes

HEADLINE = "stoi"
"""The measure that thresholds look at: bounded, made for speech, and its package needs no compiler."""

LENGTH_BYTES = 4
"""What a recording's number of samples takes beside its codes."""

EXAMPLES = 4
EXAMPLE_SECONDS = 20
"""Of the first recordings so much is kept to be listened to."""


@dataclass(frozen=True)
class Recording:
    """A sound at the tokenizer's rate, and what is said in it.

    Attributes:
        sound: values in [-1, 1].
        text: the words; None where they are not known.
    """

    sound: Float[Tensor, "1 t"]
    text: str | None = None


@dataclass(frozen=True)
class Heard:
    """Word errors on originals and on what the tokenizer made of them."""

    original: WordErrors
    reconstruction: WordErrors


@dataclass(frozen=True)
class SoundResult:
    """Figures of a tokenizer over a set.

    Attributes:
        recordings: how many.
        seconds: of sound.
        exact_lengths: recordings that came back with as many samples as went in.
        coded_bytes: what all recordings take: codes of equal length in whole bytes, and four bytes for each recording's length.
        codes: histograms of the codes.
        distortions: means over recordings.
        heard: word errors, where these were asked for.
        examples: the beginnings of the first recordings, for a report.
    """

    recordings: int
    seconds: float
    exact_lengths: int
    coded_bytes: int
    codes: CodeCounts
    distortions: Distortions
    heard: Heard | None = None
    examples: Sounds | None = None

    @property
    def headline(self) -> float | None:
        """Mean STOI; None where it could not be measured."""
        return self.distortions.means[HEADLINE]

    @property
    def bytes_per_second(self) -> float:
        return self.coded_bytes / self.seconds

    def tables(self, caption: str = "", extra: Sequence[tuple[str, str]] = ()) -> list[Table]:
        """The figures, with what they leave out, and the codebooks one by one.

        Args:
            caption: of the figures.
            extra: more figures.
        """
        codes, rows = self.codes, []
        rows += [["recordings", f"{self.recordings:,}", ""], ["seconds", f"{self.seconds:,.1f}", ""]]
        rows += [["tokens", f"{codes.tokens:,}", ""], ["bits per second", f"{codes.bits / self.seconds:,.1f}", "codes of equal length"]]
        for measure in self.distortions.measures:
            mean, remark = self.distortions.means[measure.name], self.distortions.remark(measure.name)
            rows.append([measure.label, None if mean is None else measure.show(mean), remark])
        if self.heard is not None:
            for name, errors in (("original", self.heard.original), ("reconstruction", self.heard.reconstruction)):
                rate = errors.rate
                found = f"{errors.errors:,} of {errors.words:,} words" if rate is not None else "no recording has a text"
                rows.append([f"word errors, {name}", None if rate is None else f"{100 * rate:.1f} %", found])
        rows.append(["exact lengths", f"{self.exact_lengths} of {self.recordings}", ""])
        rows += [[name.replace("_", " "), f"{value:.4g}", "mean over codebooks"] for name, value in codes.figures().items()]
        rows += [[name, value, ""] for name, value in extra]
        return [Table(["figure", "value", ""], rows, caption), codes.table()]

    def to_dict(self) -> dict[str, Any]:
        heard = self.heard and {name: vars(errors) | {"rate": errors.rate} for name, errors in vars(self.heard).items()}
        return {
            "recordings": self.recordings,
            "seconds": self.seconds,
            "tokens": self.codes.tokens,
            "bits_per_second": self.codes.bits / self.seconds,
            **self.distortions.means,
            "left_out": {name: dict(reasons) for name, reasons in self.distortions.left_out.items() if reasons},
            "not_installed": self.distortions.not_installed,
            "exact_lengths": self.exact_lengths / self.recordings,
            **self.codes.figures(),
            "codebooks": self.codes.codebooks(),
        } | ({"word_errors": heard} if heard else {})


def evaluate_sound_tokenizer(
    tokenizer: DiscreteTokenizer, recordings: Iterable[Recording], recognizer: Callable[[Tensor, int], str] | None = None
) -> SoundResult:
    """Encodes, decodes and compares every recording of a set, one by one.

    A recording that comes back with another length is cut, or followed by silence, before it is compared.

    Args:
        tokenizer: of mono sound, with codes.
        recordings: at the tokenizer's rate; read once.
        recognizer: what hears words in a sound of a rate, such as :class:`~mmtp.eval.speech.Recognizer`; it is asked about recordings
            with a text. None leaves word errors out.

    Raises:
        EvalError: the set is empty, or the tokenizer has no codes, no sample rate or several channels.
    """
    spec = tokenizer.spec
    if not spec.codebook_sizes or spec.sample_rate is None or spec.channels != 1:
        raise EvalError("a tokenizer of mono sound with codes and a sample rate is wanted")
    rate, counts, distortions = int(spec.sample_rate), CodeCounts(spec.codebook_sizes), Distortions()
    heard = Heard(WordErrors(), WordErrors())
    number = samples = exact = coded = 0
    examples: list[tuple[str, Sequence[Tensor]]] = []
    for recording in recordings:
        target = recording.sound.cpu()
        codes = tokenizer.encode([target])
        decoded = tokenizer.decode(codes)[0].float().cpu()
        output = fit(decoded, target.shape[1])
        number, samples, exact = number + 1, samples + target.shape[1], exact + (decoded.shape == target.shape)
        counts.add(codes)
        coded += coded_bytes(codes, spec.codebook_sizes)
        distortions.add(output, target, rate)
        if number <= EXAMPLES:
            pair = [sound[:, : EXAMPLE_SECONDS * rate].clone() for sound in (target, output)]
            examples.append((recording.text or f"recording {number}", pair))
        if recognizer is not None and recording.text:
            heard.original.add(recognizer(target, rate), recording.text)
            heard.reconstruction.add(recognizer(output, rate), recording.text)
    if not number:
        raise EvalError("the set holds no recordings to measure")
    return SoundResult(
        recordings=number,
        seconds=samples / rate,
        exact_lengths=exact,
        coded_bytes=coded,
        codes=counts,
        distortions=distortions,
        heard=None if recognizer is None else heard,
        examples=Sounds(["original", "reconstruction"], examples, rate, "The first recordings."),
    )


def coded_bytes(codes: Codes, codebook_sizes: Sequence[int]) -> int:
    """What a recording takes: its codes, each of a codebook at the same length, in whole bytes, and its number of samples."""
    bits = sum(ids.numel() * math.log2(size) for ids, size in zip(codes.item(0), codebook_sizes, strict=True))
    return math.ceil(bits / 8) + LENGTH_BYTES
