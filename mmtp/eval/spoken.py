"""What a model hears and says: word error rates both ways, beside what an outside recogniser and the tokenizer leave of the words.

Hearing is judged by the words of held-out recordings; saying by a recogniser that listens to what the model makes of those words. A
recogniser errs by itself, and codes lose something before any model comes into it: both are measured on the recordings, so that the rest is
the model's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.decode.sample import Sampling
from mmtp.eval.captions import elsewhere
from mmtp.eval.report import Table
from mmtp.eval.sound import Recording
from mmtp.eval.speech import WordErrors
from mmtp.tokenizers.base import DiscreteTokenizer
from mmtp.types import Codes, Segment

MODEL, OTHER, RECOGNISER = "the model", "the model, of another recording", "the recogniser"
SPOKEN, OTHER_WORDS, REAL, RECODED = "the model", "the model, another text", "recording", "recording, through the tokenizer"
Listener = Callable[[Float[Tensor, "1 t"], int], str]
"""What is said in a sound of a rate."""


@runtime_checkable
class Speaker(Protocol):
    """What is evaluated; a pipeline is one."""

    def encode_sounds(self, sounds: Sequence[Any]) -> list[Segment]:
        """Sounds as the model reads them."""
        ...

    def caption(self, media: Sequence[Any], *, batch_size: int = 64) -> list[str]:
        """What is said in every sound."""
        ...

    def say(
        self,
        texts: Sequence[str],
        samplings: Sequence[Sampling] | None = None,
        *,
        candidates: int = 1,
        at_once: int = 0,
        word_by_word: bool = False,
    ) -> list[Any]:
        """Texts as sounds; None where none was finished."""
        ...


@dataclass(frozen=True)
class SpokenResult:
    """Word errors of both ways.

    Attributes:
        heard: by whom -> what was written down of the recordings.
        said: in what -> what the recogniser wrote down; empty without one.
        unfinished: texts that the model did not finish saying; all their words count as errors.
        texts: what is right.
    """

    heard: Mapping[str, WordErrors]
    said: Mapping[str, WordErrors]
    unfinished: int
    texts: Sequence[str]

    def tables(self, name: str) -> list[Table]:
        """A table per way."""
        heard = [[by, errors.words, rate(errors)] for by, errors in self.heard.items()]
        said = [[of, errors.words, rate(errors)] for of, errors in self.said.items()]
        found = [Table(["written down by", "words", "word errors"], heard, f"{name} hears: {len(self.texts)} recordings")]
        unfinished = f"; {self.unfinished} were not finished" if self.unfinished else ""
        return found + (
            [Table(["heard in", "words", "word errors"], said, f"{name} speaks: {len(self.texts)} texts{unfinished}")] if said else []
        )

    def to_dict(self) -> dict[str, Any]:
        """Figures in plain values."""
        ways = {"heard": self.heard, "said": self.said}
        shares = {way: {of: errors.rate for of, errors in found.items()} for way, found in ways.items()}
        return {"recordings": len(self.texts), "unfinished": self.unfinished, **shares}


def rate(errors: WordErrors) -> str | None:
    """For tables."""
    return None if errors.rate is None else f"{100 * errors.rate:.1f} %"


def evaluate_spoken(
    speaker: Speaker,
    tokenizer: DiscreteTokenizer,
    recordings: Sequence[Recording],
    listen: Listener | None = None,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    candidates: int = 1,
    at_once: int = 0,
    word_by_word: bool = False,
    batch_size: int = 16,
) -> SpokenResult:
    """Lets a model write down recordings, and say their words.

    Args:
        speaker: what is evaluated.
        tokenizer: of sounds, the model's.
        recordings: with words, at the tokenizer's rate.
        listen: a recogniser; without one speaking is not judged.
        sampling: how codes are chosen; its seed is that of the first text.
        candidates: see :meth:`mmtp.pipeline.Pipeline.say`; the recogniser has no part in the choice.
        at_once: likewise.
        word_by_word: likewise.
        batch_size: recordings written down at a time.
    """
    sample_rate = int(tokenizer.spec.sample_rate or 0)
    texts = [recording.text or "" for recording in recordings]
    sounds = [recording.sound for recording in recordings]
    coded = speaker.encode_sounds(sounds)
    words = speaker.caption(coded, batch_size=batch_size)
    heard = {MODEL: _errors(words, texts), OTHER: _errors(elsewhere(words), texts)}
    if listen is None:
        return SpokenResult(heard, {}, 0, texts)
    samplings = [Sampling(**vars(sampling) | {"seed": sampling.seed + i}) for i in range(len(texts))]
    spoken = speaker.say(texts, samplings, candidates=candidates, at_once=at_once, word_by_word=word_by_word)
    with torch.no_grad():
        ids = [segment.ids for segment in coded if segment.ids is not None]
        recoded = [tokenizer.decode(Codes(codes.unsqueeze(0), torch.tensor([codes.shape[1:]])))[0] for codes in ids]
    real, said, recoded_words = (
        ["" if sound is None else listen(sound, sample_rate) for sound in some] for some in (sounds, spoken, recoded)
    )
    heard[RECOGNISER] = _errors(real, texts)
    ways = {SPOKEN: said, OTHER_WORDS: elsewhere(said), RECODED: recoded_words, REAL: real}
    return SpokenResult(heard, {of: _errors(some, texts) for of, some in ways.items()}, sum(sound is None for sound in spoken), texts)


def _errors(heard: Sequence[str], texts: Sequence[str]) -> WordErrors:
    errors = WordErrors()
    for said, text in zip(heard, texts, strict=True):
        errors.add(said, text)
    return errors
