from pathlib import Path

from mmtp import cli
from mmtp.cli.train import run_name
from mmtp.train import precision
from mmtp.train import recipe as recipes

RECIPE = 'task = "tokenizer"\n[optim]\nlr = 1e-3\n[run]\nsteps = 10\nbatch = 2\n'


def test_a_recipe_is_changed_by_the_options_and_run(tmp_path, monkeypatch, capsys):
    seen = {}

    def run_recipe(recipe, folder, *, data_root=None):
        seen.update(recipe=recipe, folder=folder, data_root=data_root)
        return Path(folder) / "result"

    monkeypatch.setattr(recipes, "run_recipe", run_recipe)
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    argv = ["train", str(path), "--set", "run.steps=5", "--set", "optim.lr=2e-4", "--max-minutes", "1.5", "--data-root", "d"]
    assert cli.run([*argv, "--run-dir", str(tmp_path / "run")]) == 0
    assert (seen["recipe"].run.steps, seen["recipe"].run.batch, seen["recipe"].optim.lr) == (5, 2, 2e-4)
    assert seen["recipe"].run.max_minutes == 1.5
    assert (seen["folder"], seen["data_root"]) == (tmp_path / "run", Path("d"))
    assert capsys.readouterr().out == f"trained: {tmp_path / 'run' / 'result'}\n"


def test_bfloat16_that_would_be_slower_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "run_recipe", lambda recipe, folder, data_root: folder)
    monkeypatch.setattr(precision, "quicker_precision", lambda: "float32")
    (tmp_path / "small.toml").write_text(RECIPE)
    for asked, lines in (("bfloat16", 1), ("float32", 0), ("auto", 0)):
        assert cli.run(["train", str(tmp_path / "small.toml"), "--set", f"run.precision={asked}"]) == 0
        assert capsys.readouterr().err.count("run.precision=auto takes the quicker") == lines


def test_an_unknown_key_of_a_recipe_is_one_line(tmp_path, capsys):
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    assert cli.run(["train", str(path), "--set", "run.stps=5"]) == 2
    assert capsys.readouterr().err == f"mmtp: error: {path}.run: unknown key 'stps'; did you mean 'steps'?\n"


def test_a_run_is_named_after_its_recipe(tmp_path):
    folder = tmp_path / "image-fsq-f8"
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    assert run_name(folder / "recipe.toml") == "image-fsq-f8"
    assert run_name(folder) == "image-fsq-f8"
    (folder / "quick.toml").write_text(RECIPE)
    assert run_name(folder / "quick.toml") == "quick"
