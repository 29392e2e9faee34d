import json

import pytest
import torch

from tests.tokenizers.pretrained.common import SETTINGS

pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

TINY = {"janus": SETTINGS["janus-vq"], "encodec": SETTINGS["encodec"], "dac": SETTINGS["dac"] | {"downsampling_ratios": [2, 4]}}


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_models_and_ways_are_in_the_table(script, tmp_path, capsys):
    out = tmp_path / "figures.json"
    script.main(["--quick", "--threads", "1", "--json", str(out)], settings=TINY)
    figures = json.loads(out.read_text())
    assert [gate["what"] for gate in figures["gates"]] == ["janus", "encodec", "dac"]
    for gate in figures["gates"]:
        assert gate["equal_codes"] == 1
        assert gate["distinct_codes"] > 3
        assert gate["batch_equal"] and gate["lengths_equal"]
    timed = [(t["what"], t["task"], t["way"]) for t in figures["timings"]]
    assert timed == [(m, task, way) for m in TINY for task in ("encode", "decode") for way in script.WAYS]
    for timing in figures["timings"]:
        assert 0 < timing["median"] <= timing["p90"]
        if timing["way"] == "transformers":
            assert timing["speedup"] == 1
    printed = capsys.readouterr()
    assert printed.out.count("| dac | 1 x 1 s |") == 8
    assert "janus 1 x 16x16 decode, 1 threads: 4 of 4" in printed.err


def test_threads_batches_and_rounds_are_those_asked_for(script, tmp_path):
    out = tmp_path / "figures.json"
    script.main(
        ["--what", "encodec", "--threads", "1", "2", "--batches", "2", "--seconds", "0.05", "0.1", "--rounds", "1", "--json", str(out)],
        settings=TINY,
    )
    timings = json.loads(out.read_text())["timings"]
    assert {(t["threads"], t["case"]) for t in timings} == {(n, f"2 x {t} s") for n in (1, 2) for t in (0.05, 0.1)}


def test_a_model_that_does_something_else_is_not_timed(script, monkeypatch):
    encode = script.encode_theirs
    monkeypatch.setattr(script, "encode_theirs", lambda *arguments: encode(*arguments) + 1)
    with pytest.raises(SystemExit, match="encodec: the adapter does not do what transformers does"):
        script.main(["--what", "encodec", "--quick"], settings=TINY)
