import pytest
import torch

from mmtp.config import ConfigError, from_dict
from mmtp.data.media import encode_png
from mmtp.train.mix import MixSource, draw_sources, read_files
from mmtp.types import Modality


def test_files_are_those_not_held_out(tmp_path):
    files = [encode_png(torch.full((3, 2, 2), i / 8)) for i in range(5)]
    for i, file in enumerate(files):
        (tmp_path / f"{i}.png").write_bytes(file)
    assert list(read_files(MixSource(source="."), Modality.IMAGE, tmp_path)) == files
    assert list(read_files(MixSource(source=".", hold_out=3), Modality.IMAGE, tmp_path)) == [files[i] for i in (1, 2, 4)]


def test_draws_are_a_function_of_seed_and_step_and_weights_are_shares():
    sources = [MixSource(source="a", weight=3.0), MixSource(source="b", weight=1.0)]
    which, draw = draw_sources(sources, 1, 5, 4000)
    again, draw_again = draw_sources(sources, 1, 5, 4000)
    assert which == again and torch.rand((), generator=draw) == torch.rand((), generator=draw_again)
    assert which != draw_sources(sources, 1, 6, 4000)[0] != draw_sources(sources, 2, 5, 4000)[0]
    assert 0.22 < sum(which) / 4000 < 0.28


@pytest.mark.parametrize("values", [{"weight": 0.0}, {"hold_out": -1}])
def test_values_that_make_no_mix(values):
    with pytest.raises(ConfigError, match="data: weight .* are wanted"):
        from_dict(MixSource, {"source": "a", **values}, "data")
