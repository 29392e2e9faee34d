import pytest

from mmtp import cli
from mmtp.train import recipe


def test_the_whole_path_in_moments(little_zoo, tmp_path, capsys, monkeypatch):
    """Everything is as in the real demo but for the size of zoo, data, model and time."""
    read = recipe.load_recipe
    little = ["model={preset='tiny'}", "run.batch=1", "data.budget=256"]
    monkeypatch.setattr(recipe, "load_recipe", lambda path, overrides: read(path, [*overrides, *little]))
    out = tmp_path / "demo"
    assert cli.run(["demo", "--minutes", "0.02", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for chapter in range(1, 8):
        assert f"{chapter} of 7: " in shown
    assert str(out / "report.html") in shown.replace("\n", "")
    files = ["tokens/train/dataset.json", "tokens/test/dataset.json", "train/log.jsonl", "train/result/config.json"]
    for name in [*files, "pictures/contact-sheet.png"]:
        assert (out / name).is_file(), name
    page = (out / "report.html").read_text()
    assert page.count("<h2") == 6 and "fresh" in page and "vqa-s" in page and "data:image/png;base64," in page and "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")

    # Again on the same folder: what is done is not done again.
    before = (out / "tokens/train/shard-00000.arrow").stat().st_mtime_ns
    assert cli.run(["demo", "--minutes", "0.02", "--out", str(out)]) == 0
    assert (out / "tokens/train/shard-00000.arrow").stat().st_mtime_ns == before


@pytest.mark.parametrize("argv", [["demo", "--minutes", "0"], ["demo", "--model", "vqa-x"]])
def test_mistakes_are_one_line(little_zoo, argv, capsys):
    assert cli.run(argv) == cli.USER_ERROR
    assert capsys.readouterr().err.count("\n") == 1
