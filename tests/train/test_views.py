import json

import pytest
import torch

from mmtp.config import ConfigError
from mmtp.data.media import encode_png
from mmtp.train.pictures import PictureData, PictureSource
from mmtp.train.views import PictureViews, View


@pytest.fixture
def root(tmp_path):
    lines = []
    for i in range(6):
        name = f"{i}.png"
        (tmp_path / name).write_bytes(encode_png(torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(i))))
        labels = [{"caption": f"number {i}"}, {"tags": ["a", "b"]}, {}][i % 3]
        lines.append(json.dumps({"path": name, **labels}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def views(root, seed=0, **values):
    source = PictureSource(source="list.jsonl", crop=(0.5, 1.0), flips="all")
    return PictureViews(PictureData(size=8, sources=(source, source)), root, seed, **values)


def test_a_batch_is_a_function_of_seed_and_step(root):
    made, again, other = views(root), views(root), views(root, seed=1)
    drawn = made.draw(3, 10)
    assert drawn == again.draw(3, 10) != made.draw(4, 10)
    pixels = made.pixels(drawn)
    assert pixels.shape == (10, 3, 8, 8) and -1 <= pixels.min() < pixels.max() <= 1
    assert torch.equal(pixels, again.pixels(drawn))
    assert not torch.equal(pixels, other.pixels(drawn))


def test_fixed_views_are_few_and_have_places(root):
    made = views(root, views=2)
    every = made.all()
    assert len(every) == len(set(every)) == 2 * 6 * 2
    assert [made.place(view) for view in every] == list(range(24))
    assert {view for step in range(30) for view in made.draw(step, 8)} == set(every)
    first, second = made.pixels([View(0, 0, 0), View(0, 0, 1)])
    assert not torch.equal(first, second)
    assert len({view.number for step in range(5) for view in views(root).draw(step, 8)}) > 30


def test_captions_stand_beside_their_pictures(root):
    made = views(root)
    found = [made.captions([View(0, i, 0)])[0] for i in range(6)]
    assert found == ["number 0", "a, b", "", "number 3", "a, b", ""]


def test_an_empty_source_is_named(root):
    (root / "0.png").write_bytes(b"no picture")
    (root / "one.jsonl").write_text('{"path": "0.png"}\n')
    with pytest.raises(ConfigError, match="one.jsonl: holds no picture that can be read"):
        PictureViews(PictureData(size=8, sources=(PictureSource(source="one.jsonl"),)), root, 0)
