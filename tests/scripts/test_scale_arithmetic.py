import pytest
import torch

from mmtp.models.unified import UnifiedModel
from scripts.scale_arithmetic import BACKBONES, LAYOUT, Hardware, main, row, size


@pytest.mark.parametrize("name", ["1B", "8B"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = UnifiedModel(UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONES[name], tie_embeddings=False))
    blocks, table = size(BACKBONES[name])
    assert model.num_parameters() == blocks + 2 * table + BACKBONES[name].width


def test_groups_trade_slow_links_for_memory() -> None:
    one, many = (row("1B", 64, groups, 1, 512, Hardware()) for groups in (1, 8))
    assert one.compute == many.compute and one.between == 0 < many.between
    assert one.within > 5 * many.within
    assert one.tokens <= many.tokens


def test_prints_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.scale_arithmetic.PLANS", (("1B", 8, 1, 1),))
    main(["--budget", "256"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[2].startswith("| 1B | 1.34 B | 8 | 1 | weights 0.626 + gathered ")
    assert lines[4] == "The whole model in the main process's host memory: 1B 5.01 GiB"
