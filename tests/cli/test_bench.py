import json

import torch

from mmtp import cli
from mmtp.data.media import encode_png


def test_decode_times_both_ways_and_finds_them_equal(little_zoo, tmp_path, capsys):
    path = tmp_path / "bench.json"
    argv = ["bench", "decode", "vqa-s", "--prompts", "2", "--temperature", "1", "--json", str(path), "--report", str(tmp_path / "a.html")]
    assert cli.run(argv) == 0
    shown = capsys.readouterr().out
    assert "Drafts accepted" in (tmp_path / "a.html").read_text() and str(tmp_path / "a.html") in shown
    assert shown.count("1 of 1") == 2
    assert "drafts accepted" in shown
    values = json.loads(path.read_text())
    assert values["all_equal"] and values["prompts"] == 2 and values["exact"]
    assert [group["kind"] for group in values["groups"]] == ["picture", "answer"]
    assert values["speedup"]["picture"] == values["groups"][0]["speedup"] > 0


def test_times_are_of_processors_where_that_is_asked(little_zoo, tmp_path, monkeypatch):
    """A clock that stands still gives no time; that of processors goes on."""
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    argv = ["bench", "decode", "vqa-s", "--prompts", "2", "--temperature", "0", "--json", str(tmp_path / "bench.json")]
    for more, stands in ((["--cpu-time"], False), ([], True)):
        assert cli.run([*argv, *more]) == 0
        values = json.loads((tmp_path / "bench.json").read_text())
        assert values["time"] == ("of the clock" if stands else "of processors")
        assert (values["groups"][0]["plain_tokens_per_second"] > 1e6) == stands


def test_prompts_that_are_tokens_need_no_tokenizer(capsys):
    assert cli.run(["bench", "decode", "vqa-s", "--data", "codes", "--tokenizer", "text-bpe-4k"]) == cli.USER_ERROR
    assert capsys.readouterr().err == "mmtp: error: --tokenizer: prompts of --data are tokens already; leave one of the two out\n"


def test_a_ratio_below_the_threshold_fails(little_zoo, capsys):
    argv = ["bench", "decode", "vqa-s", "--prompts", "2", "--temperature", "0", "--no-exact", "--at-least", "1000"]
    assert cli.run(argv) == cli.CHECK_FAILED
    assert "below the threshold" in capsys.readouterr().out


def test_prompts_come_from_a_data_set(little_zoo, tmp_path, capsys):
    source = tmp_path / "pictures"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.png").write_bytes(encode_png(torch.rand(3, 16, 16)))
        (source / f"{i}.txt").write_text("a red circle")
    command = ["tokenize", str(source), "--tokenizer", "image-fsq-f8", "--text", "text-bpe-4k", "--task", "draw", "--task", "caption"]
    assert cli.run([*command, "--out", str(tmp_path / "codes"), "--workers", "1"]) == 0
    path = tmp_path / "bench.json"
    argv = [
        "bench",
        "decode",
        "vqa-s",
        "--data",
        str(tmp_path / "codes"),
        "--prompts",
        "1",
        "--repeats",
        "1",
        "--temperature",
        "1",
        "--precision",
        "bfloat16",
    ]
    assert cli.run([*argv, "--verification", "rejection", "--drafts", "lookup", "--draft-cost", "0.1", "--json", str(path)]) == 0
    values = json.loads(path.read_text())
    assert {group["kind"]: group["prompts"] for group in values["groups"]} == {"draw": 1, "caption": 1}
    assert values["speedup"].keys() == {"draw", "caption"} and values["drafts"] == "lookup" and values["precision"] == "bfloat16"
    assert {part["modality"] for part in values["acceptance"]} <= {"text"}
