import json

from mmtp import cli


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
    assert values["picture_speedup"] == values["groups"][0]["speedup"] > 0


def test_a_ratio_below_the_threshold_fails(little_zoo, capsys):
    argv = ["bench", "decode", "vqa-s", "--prompts", "2", "--temperature", "0", "--no-exact", "--at-least", "1000"]
    assert cli.run(argv) == cli.CHECK_FAILED
    assert "below the threshold" in capsys.readouterr().out
