import pytest
import torch

from mmtp.config import ConfigError
from mmtp.data.media import encode_png
from mmtp.data.video import encode_video
from mmtp.train.videos import VideoData, VideoMix, VideoSource

SLOPE = (torch.arange(40) / 39).expand(3, 40, 40)
"""Brightness tells the column."""


@pytest.fixture
def root(tmp_path):
    for name in ("films", "pictures", "nothing"):
        (tmp_path / name).mkdir()
    clock = (torch.arange(12) / 11).view(1, 12, 1, 1).expand(3, 12, 20, 30)
    (tmp_path / "films/a.gif").write_bytes(encode_video(clock, 10, "gif"))
    (tmp_path / "films/bad.gif").write_bytes(b"GIF89a and no more")
    (tmp_path / "pictures/a.png").write_bytes(encode_png(SLOPE))
    (tmp_path / "nothing/bad.gif").write_bytes(b"GIF89a and no more")
    return tmp_path


def mix(root, frame_rate=None, frames=5, **source):
    return VideoMix(VideoData(sources=(VideoSource(**source),), size=16, frames=frames), root, 0, frame_rate=frame_rate)


def times(batch):
    return batch.add(1).div(2).mean((1, 3, 4)) * 11


def test_a_batch_depends_on_seed_and_step_alone(root):
    first, again = mix(root, source="films", crop=(0.5, 1.0)), mix(root, source="films", crop=(0.5, 1.0))
    assert torch.equal(first.batch(3, 4), again.batch(3, 4))
    assert not torch.equal(first.batch(3, 4), first.batch(4, 4))


def test_clips_of_films_are_neighbouring_frames(root):
    batch = mix(root, source="films").batch(0, 16)
    assert batch.shape == (16, 3, 5, 16, 16)
    torch.testing.assert_close(times(batch).diff(dim=1), torch.ones(16, 4), rtol=0, atol=0.1)
    assert len(times(batch)[:, 0].round().unique()) > 3


def test_a_short_film_ends_with_its_last_frame(root):
    batch = mix(root, source="films", frames=14).batch(0, 1)
    torch.testing.assert_close(times(batch)[0], torch.arange(14.0).clamp(max=11), rtol=0, atol=0.1)


def test_films_are_brought_to_the_frame_rate(root):
    batch = mix(root, source="films", frame_rate=5.0).batch(0, 1)
    torch.testing.assert_close(times(batch)[0].diff(), torch.full((4,), 2.0), rtol=0, atol=0.1)


def test_still_pictures_stay_and_panned_ones_glide_evenly(root):
    still = mix(root, source="pictures", media="still-pictures", crop=(0.4, 0.8)).batch(0, 4)
    assert torch.equal(still, still[:, :, :1].expand_as(still))
    panned = mix(root, source="pictures", media="panned-pictures", crop=(0.4, 0.8)).batch(0, 16)
    pace = (panned[:, 0].add(1).div(2).mean((2, 3)) * 39).diff(dim=1)
    assert pace.abs().amax() > 1
    torch.testing.assert_close(pace, pace.mean(1, keepdim=True).expand_as(pace), rtol=0, atol=0.25)
    seen = (panned[:, 0, :, :, -1] - panned[:, 0, :, :, 0]).mean(2)  # how much of the picture the window shows
    assert ((seen[:, -1] - seen[:, 0]).abs() > 0.1).any()


def test_all_frames_are_turned_over_alike(root):
    clips = mix(root, source="pictures", media="still-pictures", flips="horizontal").batch(0, 16)
    rising = clips[:, 0, :, :, -1].mean(2) > clips[:, 0, :, :, 0].mean(2)
    assert (rising == rising[:, :1]).all() and rising.any() and not rising.all()


def test_a_source_that_holds_nothing_is_an_error(root):
    with pytest.raises(ConfigError, match="nothing: holds nothing that can be read as videos"):
        mix(root, source="nothing")
