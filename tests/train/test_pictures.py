import pytest
import torch

from mmtp.config import ConfigError
from mmtp.data.media import encode_png
from mmtp.train.pictures import PictureData, PictureMix, PictureSource, augment, read_pictures


@pytest.fixture
def root(tmp_path):
    for folder, count, size in (("small", 6, (16, 16)), ("wide", 3, (40, 90))):
        (tmp_path / folder).mkdir()
        for i in range(count):
            (tmp_path / folder / f"{i}.png").write_bytes(encode_png(torch.full((3, *size), i / 8)))
    return tmp_path


def test_reading_holds_out_and_brings_to_size(root):
    (root / "small" / "zz.png").write_bytes(b"no picture")
    pictures = read_pictures(PictureSource(source="small", hold_out=3), 8, root)
    assert [p.shape for p in pictures] == [(3, 8, 8)] * 4
    assert [int(p[0, 0, 0]) for p in pictures] == [round(i / 8 * 255) for i in (1, 2, 4, 5)]
    assert [p.shape for p in read_pictures(PictureSource(source="wide"), 8, root)] == [(3, 8, 18)] * 3
    assert [p.shape for p in read_pictures(PictureSource(source="wide", crop=(0.5, 1.0)), 8, root)] == [(3, 32, 72)] * 3


def test_batches_are_a_function_of_seed_and_step(root):
    config = PictureData(
        size=8, sources=(PictureSource(source="small", flips="all"), PictureSource(source="wide", crop=(0.3, 1.0), flips="horizontal"))
    )
    mix, again, other = PictureMix(config, root, 1), PictureMix(config, root, 1), PictureMix(config, root, 2)
    state = torch.get_rng_state()
    batch = mix.batch(5, 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert batch.shape == (12, 3, 8, 8)
    assert -1 <= batch.min() <= batch.max() <= 1
    assert torch.equal(again.batch(5, 12), batch)
    assert not torch.equal(mix.batch(6, 12), batch)
    assert not torch.equal(other.batch(5, 12), batch)


def test_weights_are_shares_of_the_samples(root):
    config = PictureData(
        size=8, sources=(PictureSource(source="small", weight=3.0, hold_out=1000), PictureSource(source="wide", weight=1.0))
    )
    mix = PictureMix(config, root, 0)
    mix.pictures = [[torch.zeros(3, 8, 8, dtype=torch.uint8)], [torch.full((3, 8, 8), 255, dtype=torch.uint8)]]
    share = (mix.batch(0, 4000)[:, 0, 0, 0] > 0).float().mean()
    assert 0.22 < share < 0.28


def test_flips():
    picture = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(3, 4, 4)

    def seen(flips):
        draw = torch.Generator().manual_seed(0)
        source = PictureSource(source="x", flips=flips)
        return {tuple(augment(picture, source, 4, draw).flatten().tolist()) for _ in range(100)}

    assert len(seen("none")) == 1
    assert len(seen("horizontal")) == 2
    assert len(seen("all")) == 8


def test_a_source_without_pictures_is_named(root):
    (root / "empty").mkdir()
    (root / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"data\.sources: empty: holds no picture"):
        PictureMix(PictureData(sources=(PictureSource(source="empty"),)), root, 0)
