import json
from pathlib import Path

import pytest
import torch

from mmtp.data.media import encode_png, read_image
from mmtp.data.sources import open_source
from mmtp.eval.shapes import parse

MODEL = Path(__file__).parents[2] / "models" / "vqa-s"


@pytest.fixture
def source(tmp_path):
    """Two pictures with captions, and one without."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, caption in (("a", "a blue circle"), ("b", None), ("c", "a red rectangle")):
        (folder / f"{name}.png").write_bytes(encode_png(torch.zeros(3, 8, 8)))
        if caption:
            (folder / f"{name}.txt").write_text(caption)
    return folder


def test_a_model_draws_a_data_set(script, source, tmp_path):
    out = tmp_path / "own"
    command = [str(MODEL), str(out), "--source", str(source), "--candidates", "2", "--least", "0.5"]
    script.main([*command, "--pictures", "3"])
    samples = [open_source(str(out)).read(item) for item in open_source(str(out)).items()]
    assert [s.labels["caption"] for s in samples] == ["a blue circle", "a red rectangle", "a blue circle"]
    found = [parse(read_image(out / s.key)) for s in samples]
    assert [(p.colour, p.shape) for p in found] == [("blue", "circle"), ("red", "rectangle"), ("blue", "circle")]
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}

    script.main([*command, "--pictures", "4"])
    assert sorted(path.name for path in out.glob("*.png")) == [f"{i:06}.png" for i in range(4)]
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())


def test_what_the_model_does_not_read_is_left_out(script, source, tmp_path):
    out = tmp_path / "own"
    script.main([str(MODEL), str(out), "--source", str(source), "--candidates", "1", "--least", "1", "--pictures", "2"])
    assert not list(out.glob("*.png"))
    assert json.loads((out / "progress").read_text()) == 2
