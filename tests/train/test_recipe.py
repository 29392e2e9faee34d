import pytest

from mmtp.config import ConfigError
from mmtp.train import recipe as recipe_module
from mmtp.train.recipe import load_recipe, run_recipe

RECIPE = """
task = "model"
[optim]
lr = 1e-2
[run]
steps = 10
batch = 4
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "recipe.toml"


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def train(recipe, folder, *, data_root, progress):
        seen.append((recipe, folder, data_root, progress))
        return folder / "result"

    monkeypatch.setattr(recipe_module, "train_here", train, raising=False)
    monkeypatch.setitem(recipe_module.TASKS, "model", "mmtp.train.recipe:train_here")
    return seen


def test_file_folder_and_overrides(path):
    recipe = load_recipe(path)
    assert recipe == load_recipe(path.parent)
    assert (recipe.task, recipe.optim.lr, recipe.optim.clip, recipe.run.steps) == ("model", 0.01, 1.0, 10)
    changed = load_recipe(path, ["run.steps=20", "optim.ema=0.5", "run.precision=bfloat16"])
    assert (changed.run.steps, changed.optim.ema, changed.run.precision) == (20, 0.5, "bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[runs]\nx = 1", r"recipe\.toml: unknown key 'runs'; did you mean 'run'\?"),
        ("learning = 1", r"recipe\.toml\.run: unknown key 'learning'"),
        ("step = 1", r"recipe\.toml\.run: unknown key 'step'; did you mean 'steps'\?"),
        ('seed = "a"', r"recipe\.toml\.run\.seed: int is wanted, 'a' given"),
        ('precision = "float8"', r"'float8' is not one of 'float32', 'bfloat16', 'auto'"),
    ],
)
def test_mistakes_are_named(path, change, message):
    path.write_text(RECIPE + change)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_runs_the_task_with_root_from_the_environment(path, tmp_path, calls, monkeypatch):
    monkeypatch.setenv("MMTP_DATA", "/some/where")
    assert run_recipe(load_recipe(path), tmp_path / "run", progress=False) == tmp_path / "run/result"
    run_recipe(load_recipe(path), tmp_path / "run", data_root=tmp_path, progress=False)
    assert [str(call[2]) for call in calls] == ["/some/where", str(tmp_path)]


def test_another_recipe_does_not_continue_a_run_but_a_longer_one_does(path, tmp_path, calls):
    folder = tmp_path / "run"
    run_recipe(load_recipe(path), folder, progress=False)
    run_recipe(load_recipe(path, ["run.steps=99", "run.max_minutes=2.0"]), folder, progress=False)
    with pytest.raises(ConfigError, match=r"another recipe \(optim\.lr was 0\.01, is 0\.02\)"):
        run_recipe(load_recipe(path, ["optim.lr=0.02"]), folder, progress=False)
    assert len(calls) == 2


def test_the_quicker_precision_is_chosen_once_for_a_run(path, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(recipe_module, "quicker_precision", lambda: "bfloat16")
    recipe = load_recipe(path, ["run.precision=auto"])
    run_recipe(recipe, tmp_path / "run", progress=False)
    monkeypatch.setattr(recipe_module, "quicker_precision", lambda: "float32")
    run_recipe(recipe, tmp_path / "run", progress=False)
    run_recipe(recipe, tmp_path / "other", progress=False)
    assert [call[0].run.precision for call in calls] == ["bfloat16", "bfloat16", "float32"]
    with pytest.raises(ConfigError, match="run.precision was 'bfloat16', is 'float32'"):
        run_recipe(load_recipe(path), tmp_path / "run", progress=False)


def test_processes_do_not_choose_precisions_of_their_own(path, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(recipe_module, "processes", lambda: 2)
    with pytest.raises(ConfigError, match='"float32" or "bfloat16" is wanted'):
        run_recipe(load_recipe(path, ["run.precision=auto"]), tmp_path / "run", progress=False)
    assert not calls
