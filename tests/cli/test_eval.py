import json

import pytest

from mmtp import cli


def test_vqa_shows_the_controls_writes_json_and_keeps_the_threshold(little_zoo, tmp_path, capsys):
    path = tmp_path / "out" / "vqa.json"
    assert cli.run(["eval", "vqa", "vqa-s", "--limit", "12", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "no picture" in shown and "other picture" in shown and "prior" in shown and "not yes / no" in shown
    values = json.loads(path.read_text())
    assert values["eval"] == "vqa" and values["picture"]["all answers"]["total"] == 12
    assert values["headline"] == pytest.approx(values["picture"]["all answers"]["share"], abs=1e-4)

    assert cli.run(["eval", "vqa", "vqa-s", "--limit", "12", "--no-controls", "--at-least", "0.98"]) == cli.CHECK_FAILED
    shown = capsys.readouterr().out
    assert "below the threshold" in shown and "other picture" not in shown


def test_draw_counts_colours_and_shapes(little_zoo, tmp_path, capsys):
    path = tmp_path / "draw.json"
    assert cli.run(["eval", "draw", "vqa-s", "--seeds", "1", "--max-tokens", "6", "--json", str(path)]) == 0
    assert "triangle" in capsys.readouterr().out
    values = json.loads(path.read_text())
    assert values["pictures"] == 24 and values["both"] == values["headline"] < 0.5


def test_parser_reads_real_pictures(little_zoo, capsys):
    assert cli.run(["eval", "parser", "--at-least", "0.99"]) == 0
    assert "100.0 %" in capsys.readouterr().out


def test_tokenizer_reports_what_it_loses(little_zoo, tmp_path, capsys):
    path = tmp_path / "tokenizer.json"
    assert cli.run(["eval", "tokenizer", "image-fsq-f8", "--json", str(path)]) == 0
    assert "psnr" in capsys.readouterr().out
    values = json.loads(path.read_text())
    assert values["images"] == 5 and values["unreadable"] == 0 and values["headline"] == values["psnr"] > 5
    assert 0 <= values["parsed_right"] <= 1


def test_tokenizer_leaves_out_what_it_cannot_read(little_zoo, tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGBA", (20, 30), (255, 0, 0, 128)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"")
    assert cli.run(["eval", "tokenizer", "image-fsq-f8", "--data", str(folder), "--size", "32"]) == 0
    shown = capsys.readouterr().out
    assert "unreadable" in shown and "b.png" in shown


def test_text_round_trips(little_zoo, capsys):
    assert cli.run(["eval", "text", "text-bpe-4k", "--limit", "20", "--at-least", "1"]) == 0
    assert "bytes per token" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["eval", "vqa"], ["eval", "parser", "vqa-s"], ["eval", "vqa", "vqa-x"], ["eval", "vaq", "vqa-s"]])
def test_mistakes_are_one_line(little_zoo, argv, capsys):
    assert cli.run(argv) == cli.USER_ERROR
    assert capsys.readouterr().err.count("\n") == 1


def test_a_tokenizer_beside_codecs(little_zoo, tmp_path, capsys):
    report, values = tmp_path / "rates.html", tmp_path / "rates.json"
    command = ["eval", "tokenizer", "image-fsq-f8", "--limit", "2", "--size", "16", "--codecs"]
    assert cli.run([*command, "--report", str(report), "--json", str(values)]) == 0
    shown = capsys.readouterr().out
    assert "AVIF" in shown and "2 × the bytes" in shown and str(report) in shown
    assert "<svg" in report.read_text() and "WebP" in report.read_text()
    rates = json.loads(values.read_text())["rates"]
    assert rates["tokenizer"]["name"] == "image-fsq-f8" and {p["name"] for p in rates["codecs"]} == {"JPEG", "WebP", "AVIF"}
