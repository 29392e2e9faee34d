"""In a world where every word is a level of sound, errors can be counted by hand."""

from types import SimpleNamespace

import pytest
import torch

from mmtp.eval.sound import Recording
from mmtp.eval.spoken import MODEL, OTHER, OTHER_WORDS, REAL, RECODED, RECOGNISER, SPOKEN, evaluate_spoken
from mmtp.types import Codes, Modality, Segment

WORDS = ["zero", "one", "two", "three", "four", "five"]
RATE, LENGTH = 8, 4


def sound_of(text: str) -> torch.Tensor:
    return torch.tensor([[WORDS.index(word) / 10] for word in text.split()]).repeat(1, LENGTH).reshape(1, -1)


def listen(sound: torch.Tensor, rate: int) -> str:
    assert rate == RATE
    return " ".join(WORDS[i] for i in (sound[0, ::LENGTH] * 10).round().int().tolist())


class Levels:
    """Tokenizer of such sounds that cannot tell five from four."""

    config = None
    spec = SimpleNamespace(sample_rate=RATE)

    def grid(self, shape):
        return (shape[0] // LENGTH,)

    def num_tokens(self, shape):
        return shape[0] // LENGTH

    def encode(self, media):
        codes = [(sound[:, ::LENGTH] * 10).round().long().clamp(max=4).unsqueeze(0) for sound in media]
        return Codes.stack([Codes(ids, torch.tensor([[ids.shape[2]]])) for ids in codes])

    def decode(self, codes):
        return [codes.item(i).repeat_interleave(LENGTH, 1) / 10 for i in range(len(codes))]


class Model:
    """Hears what the codes say; says every "two" as "three", and cannot finish what begins with "four"."""

    def encode_sounds(self, sounds):
        return [Segment(Modality.AUDIO, Levels().encode([sound]).item(0)) for sound in sounds]

    def caption(self, media, *, batch_size=64):
        return [" ".join(WORDS[i] for i in segment.ids[0].tolist()) for segment in media]

    def say(self, texts, samplings=None, *, candidates=1, at_once=0, word_by_word=False):
        assert (candidates, at_once, word_by_word) == (2, 3, True)
        assert [sampling.seed for sampling in samplings] == list(range(3, 3 + len(texts)))
        return [None if text.startswith("four") else sound_of(text.replace("two", "three")) for text in texts]


@pytest.fixture
def recordings():
    return [Recording(sound_of(text), text) for text in ("zero one two", "three five", "four one", "two two")]


def test_errors_of_both_ways_and_what_others_have_of_them(recordings):
    from mmtp.decode.sample import Sampling

    result = evaluate_spoken(Model(), Levels(), recordings, listen, sampling=Sampling(seed=3), candidates=2, at_once=3, word_by_word=True)
    assert {by: (errors.errors, errors.words) for by, errors in result.heard.items() if by != OTHER} == {MODEL: (1, 9), RECOGNISER: (0, 9)}
    said = {of: (errors.errors, errors.words) for of, errors in result.said.items() if of != OTHER_WORDS}
    assert said == {SPOKEN: (3 + 2, 9), RECODED: (1, 9), REAL: (0, 9)}  # three twos, and two words of what is unfinished
    assert result.heard[OTHER].errors > 5 and result.said[OTHER_WORDS].errors > 5
    assert result.unfinished == 1 and result.to_dict()["said"][SPOKEN] == pytest.approx(5 / 9)
    heard, spoken = result.tables("m")
    assert ["the model", 9, "11.1 %"] in heard.rows and "1 were not finished" in spoken.caption


def test_without_a_recogniser_hearing_alone_is_judged(recordings):
    result = evaluate_spoken(Model(), Levels(), recordings)
    assert not result.said and len(result.tables("m")) == 1 and result.heard[MODEL].errors == 1
