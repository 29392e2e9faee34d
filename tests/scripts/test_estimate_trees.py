"""What trees of drafts would gain, counted while chains are decoded."""

import re
from types import ModuleType

import pytest
import torch


def test_a_tree_yields_what_its_chain_does_and_the_seconds_that_stand(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "width_costs", lambda net, widths: [float(width) for width in widths])
    threads = torch.get_num_threads()
    try:
        script.main(["--model", "vqa-s", "--prompts", "1", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| picture \| (\S+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (-?\d+) % \| (\d+) %", printed, re.MULTILINE)
    assert [float(row[0]) for row in rows] == [0.0, 1.0]
    for _, rounds, drafts_made, chain, tree, gain, dearer in rows:
        assert int(rounds) > 3 and float(drafts_made) > 1 and 1 <= float(chain) <= float(tree) <= float(chain) + 1
        assert int(gain) == pytest.approx(100 * (float(tree) / float(chain) - 1), abs=1) and 30 < int(dearer) < 100
    assert "seconds that are right" in printed
