import json
import math

import pytest
import torch

from mmtp.eval import distortion
from mmtp.eval.distortion import SILENCE, si_sdr
from mmtp.eval.reconstruction import EvalError
from mmtp.eval.sound import Recording, evaluate_sound_tokenizer
from mmtp.testing.voice import RATE, voice
from mmtp.types import Codes, Modality, TokenizerSpec

LEVELS = 100


class Steps:
    """Every sample to one of 100 steps, two samples a frame, a codebook for each; gives ``late`` samples more than it got."""

    def __init__(self, late: int = 0, channels: int = 1) -> None:
        self.config, self.late = None, late
        self.spec = TokenizerSpec(
            modality=Modality.AUDIO, codebook_sizes=(LEVELS,) * 2, downsampling=(2,), channels=channels, sample_rate=float(RATE)
        )

    def grid(self, shape):
        return (-(-shape[0] // 2),)

    def num_tokens(self, shape):
        return 2 * self.grid(shape)[0]

    def encode(self, media):
        (sound,) = media
        padded = torch.nn.functional.pad(sound, (0, sound.shape[1] % 2))
        ids = ((padded[0] + 1) / 2 * (LEVELS - 1)).round().long().reshape(-1, 2).T[None]
        return Codes(ids, torch.tensor([[ids.shape[2]]]), torch.tensor([[sound.shape[1]]]))

    def decode(self, codes):
        sound = (codes.item(0).T.reshape(1, -1) / (LEVELS - 1) * 2 - 1)[:, : int(codes.sizes[0, 0])]
        return [torch.nn.functional.pad(sound, (0, self.late))]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """PESQ and STOI have tests of their own."""
    monkeypatch.setattr(distortion, "MEASURES", [m for m in distortion.MEASURES if m.name in ("mel", "si_sdr")])
    monkeypatch.setattr("mmtp.eval.sound.HEADLINE", "si_sdr")


def test_a_whole_set():
    tokenizer, sounds = Steps(), [voice(0.5), voice(0.25, seed=1)[:, :3999], torch.zeros(1, 1000)]
    result = evaluate_sound_tokenizer(tokenizer, (Recording(sound) for sound in sounds))
    assert (result.recordings, result.exact_lengths) == (3, 3)
    assert result.codes.tokens == 8000 + 4000 + 1000
    assert result.seconds == pytest.approx((8000 + 3999 + 1000) / RATE)
    assert result.coded_bytes == sum(math.ceil(n * math.log2(LEVELS) / 8) + 4 for n in (8000, 4000, 1000))
    outputs = [tokenizer.decode(tokenizer.encode([sound]))[0] for sound in sounds[:2]]
    assert result.headline == pytest.approx(sum(si_sdr(o, s, RATE) for o, s in zip(outputs, sounds, strict=False)) / 2)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["left_out"] == {"si_sdr": {"the original is silent": 1}}
    assert values["bits_per_second"] == pytest.approx(13000 * math.log2(LEVELS) / result.seconds)
    label, (before, after) = result.examples.rows[2]
    assert label == "recording 3" and torch.equal(before, sounds[2]) and after.shape == before.shape
    assert len(values["codebooks"]) == 2 and "word_errors" not in values
    figures, books = result.tables("steps", [("more", "1")])
    rows = {row[0]: row[1:] for row in figures.rows}
    assert rows["SI-SDR"] == [f"{result.headline:.2f} dB", "1 left out: the original is silent"]
    assert rows["exact lengths"][0] == "3 of 3" and rows["more"][0] == "1"
    assert [row[:2] for row in books.rows] == [["0", LEVELS], ["1", LEVELS]]


def test_silence_alone_has_no_headline():
    result = evaluate_sound_tokenizer(Steps(), [Recording(torch.full((1, 400), SILENCE / 2))])
    assert result.headline is None
    assert {row[0]: row[1] for row in result.tables()[0].rows}["SI-SDR"] is None


def test_another_length_is_noticed_and_not_held_against_the_sound():
    exact, late = (evaluate_sound_tokenizer(Steps(late=n), [Recording(voice(0.25))]) for n in (0, 7))
    assert (exact.exact_lengths, late.exact_lengths) == (1, 0)
    assert exact.headline == late.headline


def test_words_are_counted_where_there_is_a_text():
    heard = []

    def recognizer(sound, rate):
        heard.append(rate)
        return "one two three" if len(heard) % 2 else "one too"

    recordings = [Recording(voice(0.1), "One, two, three."), Recording(voice(0.1)), Recording(voice(0.1), "one")]
    result = evaluate_sound_tokenizer(Steps(), recordings, recognizer)
    assert heard == [RATE] * 4
    errors = result.to_dict()["word_errors"]
    assert errors["original"] == {"errors": 2, "words": 4, "rate": 0.5}
    assert errors["reconstruction"] == {"errors": 3, "words": 4, "rate": 0.75}
    rows = {row[0]: row[1:] for row in result.tables()[0].rows}
    assert rows["word errors, reconstruction"] == ["75.0 %", "3 of 4 words"]
    without = evaluate_sound_tokenizer(Steps(), [Recording(voice(0.1))], recognizer)
    assert {row[0]: row[1:] for row in without.tables()[0].rows}["word errors, original"] == [None, "no recording has a text"]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(EvalError, match="no recordings"):
        evaluate_sound_tokenizer(Steps(), [])
    with pytest.raises(EvalError, match="mono sound"):
        evaluate_sound_tokenizer(Steps(channels=2), [Recording(voice(0.1))])
