import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtp.config import ConfigError
from mmtp.data.encode import TokenizeConfig
from mmtp.data.job import tokenize
from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.data.media import encode_png
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.tokenizers.continuous.patches import PatchImageTokenizer
from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.quantizers import MultiScaleVQ
from mmtp.tokenizers.text import TextTokenizer
from mmtp.train.distributed import ParallelConfig
from mmtp.train.recipe import Recipe, run_recipe

RANKS = Path(__file__).with_name("ranks.py")
RECIPE: dict[str, Any] = {
    "task": "model",
    "model": {"preset": "tiny"},
    "data": {"shards": ["shards"], "budget": 64},
    "loss": {"mtp_weight": 1.0, "detach": False},
    "optim": {"lr": 1e-3, "warmup": 2, "ema": 0.9, "weight_decay": 0.1, "clip": 0.5},
    "run": {"steps": 4, "batch": 4, "seed": 3, "log_every": 1, "checkpoint_every": 1},
}


def recipe(**changes: dict) -> dict[str, Any]:
    return {key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in RECIPE.items()}


def launch(*jobs: dict[str, Any]) -> list[list[int]]:
    """Runs jobs one after the other, each in several processes; gives their exit codes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RANKS.parents[2])}
    argv = [sys.executable, str(RANKS), json.dumps(jobs)]
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, check=True, timeout=600)
    return json.loads(done.stdout)


def job(processes: int, folder: Path, root: Path, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"processes": processes, "folder": str(folder), "root": str(root), "recipe": given, **more}


def records(folder: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())}


def worst(one: Path, other: Path) -> float:
    """Greatest difference of two results' weights."""
    first, second = (from_pretrained(folder / "result").state_dict() for folder in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def assert_equal_runs(one: Path, other: Path) -> None:
    """Losses, gradients and everything else that is logged of every step, and the average's weights at the end."""
    first, second = records(one), records(other)
    assert list(first) == list(second)
    for step, record in first.items():
        timeless = {key: value for key, value in record.items() if not key.endswith("_per_second")}
        assert {key: second[step][key] for key in timeless} == pytest.approx(timeless, rel=1e-5), step
    assert worst(one, other) < 1e-5


def built(folder: Path) -> list[str]:
    """Which processes of a run have had a whole model."""
    return sorted(path.name for path in folder.glob("built-*"))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures with captions as shards: ``seen`` holds them as vectors, ``scales`` as pyramids of codes."""
    root = tmp_path_factory.mktemp("captioned")
    torch.manual_seed(0)
    (root / "pictures").mkdir()
    names = [f"{colour} {shape}" for colour in ("red", "blue") for shape in ("dots", "rings", "bars", "stripes in a row")]
    for i, name in enumerate(names):
        (root / "pictures" / f"{i}.png").write_bytes(encode_png(torch.rand(3, 16, 16)))
        (root / "pictures" / f"{i}.txt").write_text(name)
    quantizer = MultiScaleVQ.Config(scales=(1, 2, 4), codebook_size=24, codebook_dim=6, convolutions=2)
    pyramid = ConvImageTokenizer.Config(patch=2, widths=(8, 12), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=quantizer).build()
    pyramid(torch.rand(8, 3, 16, 16) * 2 - 1)  # starts the codebook
    save_pretrained(pyramid.eval(), root / "pyramid")
    text = TextTokenizer.train(names * 4, 300)
    for folder, tokenizer, task in (("seen", PatchImageTokenizer.Config(patch=8).build(), "caption"), ("scales", root / "pyramid", "draw")):
        config = TokenizeConfig(tasks=(task,), max_dim=21)
        tokenize(root / "pictures", root / folder, tokenizer=tokenizer, text=text, config=config)
    return root


@pytest.fixture(scope="module")
def single(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    run_recipe(Recipe.from_dict(recipe()), folder, data_root=root, progress=False)
    return folder


@pytest.fixture(scope="module")
def lost(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two processes: ``whole``, and ``cut``, in which one process is killed as it begins step 3.

    Also ``odd``, of three, and ``unmade``, whose tokenizer is missing.
    """
    folder = tmp_path_factory.mktemp("lost")
    codes = launch(
        job(2, folder / "whole", root, recipe()),
        job(2, folder / "cut", root, recipe(), lost={"rank": 1, "step": 3}),
        job(3, folder / "odd", root, recipe()),
        job(2, folder / "unmade", root, recipe(model={"codebook_init": True})),
    )
    assert codes == [[0, 0], [2, -9], [2, 2, 2], [2, 2]]
    return folder


def test_two_processes_equal_one(single: Path, lost: Path) -> None:
    assert_equal_runs(single, lost / "whole")
    names = sorted(path.name for path in (lost / "whole" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]
    assert built(lost / "whole") == ["built-0"]


def test_every_process_says_why_the_main_one_cannot_make_the_model(lost: Path) -> None:
    messages = [(lost / "unmade" / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert messages[0].startswith("BlockTokenizer: no such path or zoo entry") and messages[1] == messages[0]
    assert built(lost / "unmade") == ["built-0"]


def test_a_lost_process_ends_the_run_with_one_line_and_one_goes_on_from_its_checkpoint(
    root: Path, single: Path, lost: Path, tmp_path: Path
) -> None:
    message = (lost / "cut" / "error-0.txt").read_text()
    assert message == "step 3: another process of this run is lost; run the same command again: it continues from the last checkpoint"
    assert (lost / "cut" / "checkpoints" / "step-00000002" / ".metadata").is_file()
    shutil.copytree(lost / "cut", tmp_path / "again")
    run_recipe(Recipe.from_dict(recipe()), tmp_path / "again", data_root=root, progress=False)
    assert_equal_runs(single, tmp_path / "again")


def test_processes_that_do_not_divide_the_batch_are_refused(lost: Path) -> None:
    assert "4 rows over 3 processes (rank 1): the number of processes must divide" in (lost / "odd" / "error-1.txt").read_text()


@pytest.mark.heavy
def test_four_processes_go_on_from_two_and_in_two_groups_equal_one(root: Path, single: Path, lost: Path, tmp_path: Path) -> None:
    shutil.copytree(lost / "cut", tmp_path / "again", ignore=shutil.ignore_patterns("built-*"))
    groups = recipe(run={"parallel": {"replicate": 2}})
    assert launch(job(4, tmp_path / "again", root, recipe()), job(4, tmp_path / "groups", root, groups)) == [[0] * 4] * 2
    assert_equal_runs(single, tmp_path / "again")
    assert_equal_runs(single, tmp_path / "groups")
    assert not built(tmp_path / "again") and built(tmp_path / "groups") == ["built-0"]


@pytest.mark.heavy
def test_two_processes_divide_weights_of_single_media(root: Path, tmp_path: Path) -> None:
    given = recipe(model={"backbone": {"modality_specific": "all"}, "activation_checkpointing": True})
    run_recipe(Recipe.from_dict(given), tmp_path / "one", data_root=root, progress=False)
    assert launch(job(2, tmp_path / "two", root, given)) == [[0, 0]]
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.heavy
def test_two_processes_start_from_a_saved_model(root: Path, single: Path, tmp_path: Path) -> None:
    changes = {"backbone": {"modality_specific": "mlp"}, "head": {"type": "parallel", "mtp_depth": 2}}
    given = recipe(model={"preset": "", "start": str(single / "result"), **changes})
    run_recipe(Recipe.from_dict(given), tmp_path / "one", data_root=root, progress=False)
    assert launch(job(2, tmp_path / "two", root, given)) == [[0, 0]]
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert built(tmp_path / "two") == ["built-0"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "model",
    [{"backbone": {"cross_attention_every": 2}}, {"next_scale": True, "codebook_init": True, "tie_embeddings": False}],
    ids=["cross-attention", "next-scale"],
)
def test_models_with_vectors_and_scales_that_only_some_rows_have(
    captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any]
) -> None:
    monkeypatch.chdir(captioned)
    data = {"shards": ["seen", "scales"], "budget": 48}
    batches = [
        PackedBatches([ShardDataset(Path(name)) for name in data["shards"]], rows=2, budget=48, seed=3, world_size=2, rank=r)
        for r in (0, 1)
    ]
    assert [batch.batch(1).feature_index is None for batch in batches] == [False, True]
    plain, compiled = (recipe(model=model | {"compile": each}, data=data, run={"steps": 3, "batch": 2}) for each in (False, True))
    run_recipe(Recipe.from_dict(plain), tmp_path / "one", data_root=captioned, progress=False)
    jobs = [job(2, tmp_path / name, captioned, given) for name, given in (("two", plain), ("compiled", compiled))]
    assert launch(*jobs) == [[0, 0]] * 2
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert_equal_runs(tmp_path / "one", tmp_path / "compiled")


@pytest.mark.heavy
def test_muon_in_two_processes_agrees_as_far_as_bfloat16_does(root: Path, tmp_path: Path) -> None:
    given = recipe(optim={"muon_lr": 1e-2})
    run_recipe(Recipe.from_dict(given), tmp_path / "one", data_root=root, progress=False)
    assert launch(job(2, tmp_path / "two", root, given)) == [[0, 0]]
    for step, record in records(tmp_path / "one").items():
        assert records(tmp_path / "two")[step]["loss"] == pytest.approx(record["loss"], rel=3e-4)


@pytest.mark.heavy
def test_torchrun_starts_the_command_line(root: Path, single: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(run={"precision": "bfloat16", "steps": 2})))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmtp", "train"]
    argv = [*launcher, str(tmp_path / "recipe.json"), "--run-dir", str(tmp_path / "run"), "--data-root", str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RANKS.parents[2])}
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    assert done.stdout.count("trained: ") == 1
    found, wanted = records(tmp_path / "run"), records(single)
    assert [found[step]["loss"] for step in (1, 2)] == pytest.approx([wanted[step]["loss"] for step in (1, 2)], rel=0.02)


def test_groups_of_processes_make_up_all() -> None:
    assert ParallelConfig().sizes(8) == (1, 8)
    assert ParallelConfig(replicate=2).sizes(8) == (2, 4)
    assert ParallelConfig(replicate=2, shard=4).sizes(8) == (2, 4)
    for config in (ParallelConfig(replicate=3), ParallelConfig(replicate=16), ParallelConfig(shard=4)):
        with pytest.raises(ConfigError, match="run.parallel: replicate .* does not make up 8 processes"):
            config.sizes(8)


def test_tokenizers_are_trained_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="task = 'text' trains in one process, and 2 were launched"):
        run_recipe(Recipe.from_dict({"task": "text"}), tmp_path, progress=False)


def test_models_that_write_vectors_are_trained_by_one_process(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="model: flow heads are trained by one process"):
        run_recipe(Recipe.from_dict(recipe(model={"flow": {"type": "token"}})), tmp_path, data_root=root, progress=False)
