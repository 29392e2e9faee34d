import io
import tarfile

import pytest
import soundfile
import torch

from mmtp.config import ConfigError, from_dict
from mmtp.data.media import encode_png
from mmtp.train.mix import MixSource
from mmtp.train.sounds import LOUDEST, SoundData, SoundMix, read_sounds, spectrogram

RATE, HOP = 4000, 100


def flac(samples, level, rate=RATE):
    out = io.BytesIO()
    soundfile.write(out, torch.full((samples,), level).numpy(), rate, format="FLAC")
    return out.getvalue()


@pytest.fixture
def root(tmp_path):
    files = {"a.flac": flac(6000, 0.25), "b.flac": b"fLaC and no more", "c.flac": flac(2000, 0.5), "d.flac": flac(3000, 0.75, 8000)}
    with tarfile.open(tmp_path / "sounds.tar", "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return tmp_path


def mix(root, seed=0, seconds=0.63, **source):
    config = SoundData(sources=(MixSource(source="sounds.tar", **source),), seconds=seconds)
    return SoundMix(config, root, seed, sample_rate=RATE, hop=HOP)


def test_reading_brings_to_one_rate_holds_out_and_passes_over_damage(root):
    sounds = read_sounds(MixSource(source="sounds.tar"), RATE, root)
    assert [s.shape for s in sounds] == [(1, 6000), (1, 2000), (1, 1500)]
    assert [round(float(s[0, 700]) / LOUDEST, 2) for s in sounds] == [0.25, 0.5, 0.75]
    assert [s.shape[1] for s in read_sounds(MixSource(source="sounds.tar", hold_out=2), RATE, root)] == [1500]


def test_batches_are_whole_frames_and_a_function_of_seed_and_step(root):
    one, again, other = mix(root, 1), mix(root, 1), mix(root, 2)
    state = torch.get_rng_state()
    batch = one.batch(5, 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert batch.shape == (12, 1, 2500) and batch.dtype == torch.float32
    assert torch.equal(again.batch(5, 12), batch)
    assert not torch.equal(one.batch(6, 12), batch)
    assert not torch.equal(other.batch(5, 12), batch)


def test_every_second_counts_alike_and_short_sounds_are_followed_by_silence(root):
    batch = mix(root).batch(0, 4000)[:, 0]
    for level, share, length in ((0.25, 6000 / 9500, 2500), (0.5, 2000 / 9500, 2000), (0.75, 1500 / 9500, 1500)):
        mine = batch[(batch[:, 700] - level).abs() < 0.02]
        assert len(mine) / 4000 == pytest.approx(share, abs=0.03)
        assert (mine[:, length - 1] > 0.2).all() and not mine[:, length:].any()


def test_windows_begin_anywhere(root):
    found = mix(root, seconds=0.1)
    found.sounds = [[torch.arange(1000, dtype=torch.int16)[None]]]
    found.ends = [torch.tensor([1000])]
    firsts = found.batch(0, 3000)[:, 0, 0].mul(LOUDEST).round()
    assert firsts.min() < 10 and 590 < firsts.max() <= 600


def test_a_source_without_sounds_is_named(root):
    with tarfile.open(root / "pictures.tar", "w") as archive:
        data = encode_png(torch.zeros(3, 2, 2))
        member = tarfile.TarInfo("a.png")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ConfigError, match=r"data\.sources: pictures\.tar: holds no sound that can be read"):
        SoundMix(SoundData(sources=(MixSource(source="pictures.tar"),)), root, 0, sample_rate=RATE, hop=HOP)
    with pytest.raises(ConfigError, match="data: seconds 0: more than 0 is wanted"):
        from_dict(SoundData, {"sources": [], "seconds": 0}, "data")


def test_a_spectrogram_is_bright_where_the_tone_is():
    tone = torch.sin(2 * torch.pi * 1000 / 8000 * torch.arange(4000.0))[None]
    picture = spectrogram(tone)
    assert picture.shape == (3, 257, 32) and picture.min() >= 0 and picture.max() <= 1
    brightness = picture.sum(0).mean(1)
    assert abs(int(brightness.argmax()) - (256 - 64)) <= 1  # 1000 Hz of 4000, from below
    assert picture[:, 10, 4:-4].max() < 0.2  # at its ends a tone that is cut clicks
    assert spectrogram(torch.zeros(1, 4000)).amax() < 0.1
