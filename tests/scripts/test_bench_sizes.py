import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmtp.eval.decoding import Prompt
from mmtp.models.unified import UnifiedModel
from tests.decode.test_engine import PICTURE
from tests.models.test_refiner import refining


@pytest.fixture
def bench(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Runs the script over a tiny model and some prompts; gives its status."""
    prompts = [Prompt("draw", PICTURE, 16), Prompt("caption", PICTURE[:6], 8), Prompt("draw", PICTURE, 12)]
    monkeypatch.setattr(script, "from_pretrained", lambda name: refining())
    monkeypatch.setattr(script, "ShardDataset", lambda path: type("Data", (), {"over": lambda self, layout: self})())
    monkeypatch.setattr(script, "held_out_prompts", lambda data, count: prompts)
    threads = torch.get_num_threads()
    yield lambda *argv: script.main(["some-model", "--data", "some", *map(str, argv)])
    torch.set_num_threads(threads)


@pytest.mark.parametrize("settings", [(), ("--no-compile",), ("--precision", "bfloat16")])
def test_the_same_tokens_are_written_at_every_size(bench, settings: tuple[str, ...], tmp_path: Path, capsys) -> None:
    assert bench("--times", 1, 3, "--json", tmp_path / "gains.json", *settings) == 0
    gains = json.loads((tmp_path / "gains.json").read_text())
    assert [(g["times"], g["kind"], g["temperature"]) for g in gains] == [
        (times, kind, t) for times in (1, 3) for kind in ("draw", "caption") for t in (0, 1)
    ]
    assert all(g["equal"] == g["prompts"] == (2 if g["kind"] == "draw" else 1) for g in gains)
    assert gains[-1]["parameters"] > 1.5 * gains[0]["parameters"]
    assert all(g[figure] > 0 for g in gains for figure in ("tokens_per_pass", "cost", "milliseconds", "speed"))
    assert ("compiled passes" in (printed := capsys.readouterr().out)) == ("--no-compile" not in settings) and "| draw |" in printed


def test_kinds_are_left_out_and_what_differs_is_told(bench, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def another(net: UnifiedModel, times: int) -> UnifiedModel:
        if times > 1:
            with torch.no_grad():
                net.unembedding.weight.copy_(net.unembedding.weight.flip(0))
        return net.eval()

    monkeypatch.setattr(script, "widened", another)
    assert bench("--times", 1, 2, "--kinds", "draw", "--temperature", 1) == 1
    assert "| 0 of 2 |" in (printed := capsys.readouterr().out) and "caption" not in printed
