import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmtp.decode.costs import COMPILED
from mmtp.eval.decoding import Prompt
from mmtp.stream.vocab import Special
from tests.models.common import LAYOUT
from tests.models.test_refiner import refining

DRAW = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT, Special.BOI, LAYOUT.dim(4), LAYOUT.dim(4)]


@pytest.fixture
def bench(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Runs the script over a tiny model and some prompts; gives its status."""
    picture = Prompt("draw", DRAW, 16, (int(Special.EOI),))
    prompts = [picture, Prompt("caption", DRAW[:6], 16), picture]
    monkeypatch.setattr(script, "decoder", lambda name, precision: refining())
    monkeypatch.setattr(script, "ShardDataset", lambda path: type("Data", (), {"over": lambda self, layout: self})())
    monkeypatch.setattr(script, "held_out_prompts", lambda data, count: prompts)
    threads = torch.get_num_threads()
    yield lambda *argv: script.main(["some-model", "--data", "some", "--repeats", "1", *map(str, argv)])
    torch.set_num_threads(threads)


def test_rounds_of_every_number_of_drafts_are_timed_beside_what_is_reckoned(bench, script: ModuleType, tmp_path: Path, capsys) -> None:
    assert bench("--rows", 1, 2, "--json", tmp_path / "costs.json") == 0
    costs = json.loads((tmp_path / "costs.json").read_text())
    ways = [(compiled, rows, drafts) for compiled in (False, True) for rows in (1, 2) for drafts in script.DRAFTS]
    assert [(cost["compiled"], cost["rows"], cost["drafts"]) for cost in costs] == ways
    assert all(cost["milliseconds"] > 0 and cost["ratio"] > 0 for cost in costs)
    assert all(cost["ratio"] == cost["reckoned"] == 1 for cost in costs if not cost["drafts"])
    reckoned = COMPILED.costs(refining())
    assert costs[-1]["reckoned"] == pytest.approx(reckoned.round(2, 8) / reckoned.round(2, 0))
    assert "| compiled | 2 |" in capsys.readouterr().out


def test_what_a_refiner_takes_is_timed_and_reckoned_too(bench, tmp_path: Path) -> None:
    assert bench("--rows", 2, "--drafts", "refined", "--json", tmp_path / "costs.json") == 0
    last = json.loads((tmp_path / "costs.json").read_text())[-1]
    costs = COMPILED.costs(refining())
    making = 8 * costs.draft * costs.price(2).alone
    assert making > 0 and last["reckoned"] == pytest.approx(costs.round(2, 8) / costs.round(2, 0) + making)


def test_asks_for_prompts_of_pictures_or_sounds_enough(bench, capsys) -> None:
    assert bench("--rows", 3) == 1
    assert "has prompts of 2 pictures or sounds, and 3 rows are wanted" in capsys.readouterr().err


def test_a_decoder_of_random_weights_draws_without_data(script: ModuleType, capsys) -> None:
    threads = torch.get_num_threads()
    try:
        assert script.main(["tiny", "--repeats", "1", "--rows", "2", "--ways", "compiled", "--precision", "bfloat16"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "| compiled | 2 |" in (printed := capsys.readouterr().out) and "torch" not in printed
    with pytest.raises(SystemExit):
        script.main(["emoji-s"])
    assert "--data: of emoji-s prompts are wanted" in capsys.readouterr().err
