import math

import pytest
import torch

from mmtp.eval import distortion, sound_rate
from mmtp.eval.codes import CodeCounts, EvalError
from mmtp.eval.distortion import Distortions, stoi
from mmtp.eval.sound import Recording, SoundResult, evaluate_sound_tokenizer
from mmtp.eval.sound_rate import CODECS, codec2, compare_sound_rates, opus
from mmtp.tokenizers.audio.frame import FrameAudioTokenizer
from mmtp.tokenizers.quantizers import FSQ, QuantizerConfig, ResidualFSQ

from .voice import RATE, voice


def own(sounds: list[torch.Tensor]) -> SoundResult:
    """Figures of a tokenizer that changes nothing, at 1000 bytes a second."""
    distortions = Distortions()
    for sound in sounds:
        distortions.add(sound, sound, RATE)
    seconds = sum(sound.shape[1] for sound in sounds) / RATE
    return SoundResult(len(sounds), seconds, len(sounds), int(1000 * seconds), CodeCounts((2,)), distortions)


def untrained(quantizer: QuantizerConfig) -> FrameAudioTokenizer:
    torch.manual_seed(1)
    config = FrameAudioTokenizer.Config(
        sample_rate=RATE, window=320, hop=160, width=8, encoder_blocks=1, decoder_blocks=1, quantizer=quantizer
    )
    return config.build().eval()


PLAIN = untrained(FSQ.Config(levels=(5, 5)))


@pytest.mark.parametrize("rate", [16000, 22050])
def test_opus_takes_the_bytes_it_is_given_and_is_better_with_more(rate):
    pytest.importorskip("pystoi")
    sound = voice(2.0, rate=rate)
    found = []
    for kbps in (8, 24):
        output, size = opus(sound, rate, kbps)
        assert output.shape == sound.shape
        assert 0.8 < 8 * size / 2 / (1000 * kbps) < 1.8  # the container's heads weigh heavily on two seconds
        found.append((size, stoi(output, sound, rate)))
    (small, worse), (large, better) = found
    assert small < large and 0.7 < worse < better


def test_codec2_has_frames_of_fixed_size_and_no_delay_left():
    pytest.importorskip("pycodec2")
    pytest.importorskip("pystoi")
    sound = voice(1.2)
    output, size = codec2(sound, RATE, 3.2)
    frames = -(-(9600 + 160) // 160)
    assert output.shape == sound.shape and size == 7 + 8 * frames
    straight = stoi(output, sound, RATE)
    assert straight > 0.6
    assert straight > max(stoi(output.roll(shift, 1), sound, RATE) for shift in (-320, 320))


def test_a_tokenizer_beside_codecs(monkeypatch):
    monkeypatch.setattr(distortion, "MEASURES", [m for m in distortion.MEASURES if m.name in ("mel", "si_sdr")])
    monkeypatch.setitem(CODECS, "Opus", sound_rate.SoundCodec((6, 24), opus))
    monkeypatch.delitem(CODECS, "Codec2")
    seen, sounds = [], [voice(1.0), torch.zeros(1, 4000)]
    recordings = [Recording(sound) for sound in sounds]
    result = compare_sound_rates(PLAIN, own(sounds), "copy", recordings, progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]
    assert result.tokenizer.bytes == 1000 and result.tokenizer.mel == 0
    low, high = result.codecs
    assert low.bytes == pytest.approx(sum(opus(sound, RATE, 6)[1] for sound in sounds) / 1.25)
    assert low.bytes < high.bytes and low.mel > high.mel and low.si_sdr < high.si_sdr
    # What the tokenizer's figures leave out is said once; other things are said of each codec.
    assert result.notes == ["copy, SI-SDR: 1 left out: the original is silent"]
    table = result.table()
    assert "smallest (6 kbit/s)" in table.rows[-1][1]
    assert table.columns == ["", "at", "bytes per second", "mel distance", "SI-SDR"]  # what was not measured has no column


def test_words_are_heard_in_codecs_as_well(monkeypatch):
    monkeypatch.setattr(distortion, "MEASURES", [m for m in distortion.MEASURES if m.name == "mel"])
    monkeypatch.setitem(CODECS, "Opus", sound_rate.SoundCodec((6, 24), opus))
    monkeypatch.delitem(CODECS, "Codec2")
    recordings = [Recording(voice(0.5), "one two"), Recording(voice(0.5))]
    heard = iter(["one two", "two"])
    result = compare_sound_rates(PLAIN, own([r.sound for r in recordings]), "copy", recordings, lambda sound, rate: next(heard))
    assert [point.words for point in result.codecs] == [0.0, 0.5]  # asked about the recording with a text only
    assert result.tokenizer.words is None
    table = result.table()
    assert table.columns[-1] == "word errors" and [table.rows[0][-1], table.rows[-1][-1]] == [None, "0.0%"]


def test_a_residual_tokenizer_is_a_curve(monkeypatch):
    monkeypatch.setattr(distortion, "MEASURES", [m for m in distortion.MEASURES if m.name == "mel"])
    monkeypatch.setattr(sound_rate, "CODECS", {})
    tokenizer, sounds = untrained(ResidualFSQ.Config(num_codebooks=4, levels=(5, 5))), [voice(0.3), voice(0.11)]
    recordings = [Recording(sound) for sound in sounds]
    result = compare_sound_rates(tokenizer, evaluate_sound_tokenizer(tokenizer, recordings), "mine", recordings)
    assert [p.setting for p in result.fewer] == ["the first codebook", "the first 2 codebooks"]
    seconds, frames = sum(sound.shape[1] for sound in sounds) / RATE, (30, 11)
    sizes = [sum(math.ceil(k * n * math.log2(25) / 8) + 4 for n in frames) / seconds for k in (1, 2, 4)]
    assert [p.bytes for p in (*result.fewer, result.tokenizer)] == pytest.approx(sizes)
    assert len({p.mel for p in (*result.fewer, result.tokenizer)}) == 3


def test_codecs_that_are_missing_leave_a_line(monkeypatch):
    monkeypatch.setattr(distortion, "MEASURES", [m for m in distortion.MEASURES if m.name == "mel"])
    monkeypatch.setattr(sound_rate.soundfile, "available_subtypes", lambda format: {"VORBIS": "Vorbis"})

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(distortion, "import_module", missing)
    sounds = [voice(0.2)]
    result = compare_sound_rates(PLAIN, own(sounds), "copy", [Recording(sound) for sound in sounds])
    assert not result.codecs and len(result.table().rows) == 1
    opus_note, codec2_note = result.notes
    assert "Opus: libsndfile" in opus_note and codec2_note == "Codec2: not installed: pip install 'mmtp[audio-eval]'"


def test_an_empty_set_is_refused():
    with pytest.raises(EvalError, match="no recordings"):
        compare_sound_rates(PLAIN, own([voice(0.1)]), "copy", [])
