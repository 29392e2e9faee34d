import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmtp.data.encode import TokenizeConfig
from mmtp.data.job import tokenize
from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling
from mmtp.hub import from_pretrained, read_config, save_pretrained
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import MediaEntry, VocabLayout, VocabMismatch
from mmtp.testing.fakes import BlockTokenizer
from mmtp.train.model_choice import ModelChoice
from mmtp.train.recipe import Recipe, run_recipe
from mmtp.types import Modality

RECIPE = {
    "task": "model",
    "model": {"preset": "tiny"},
    "data": {"shards": ["shards"], "budget": 64},
    "loss": {"mtp_weight": 1.0},
    "optim": {"lr": 3e-3, "warmup": 2},
    "run": {"steps": 12, "batch": 4, "seed": 3, "log_every": 1, "checkpoint_every": 3},
}


def recipe(**changes: dict) -> Recipe:
    return Recipe.from_dict({key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in RECIPE.items()})


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; the last record of a step counts."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


@pytest.fixture(scope="module")
def uninterrupted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_recipe(recipe(), folder, data_root=root, progress=False)
    return folder


def test_learns_and_leaves_a_model_that_decodes(uninterrupted: Path) -> None:
    found = losses(uninterrupted)
    assert found[12] < 0.8 * found[1]
    model = from_pretrained(uninterrupted / "result")
    assert isinstance(model, UnifiedModel)
    tokens = Engine(model).generate([1], Sampling(seed=1), 40).tokens
    assert len(tokens) > 1
    record = json.loads((uninterrupted / "log.jsonl").read_text().splitlines()[-1])
    assert {"image", "image.share", "image.accuracy", "image.grad", "image+1", "image+2", "text", "tokens_per_second"} <= record.keys()


def test_a_killed_run_continues_to_the_same_losses(root: Path, uninterrupted: Path, tmp_path: Path) -> None:
    script = (
        "import sys, json; from mmtp.train.recipe import Recipe, run_recipe\n"
        "import torch; torch.set_num_threads(1)\n"
        "run_recipe(Recipe.from_dict(json.loads(sys.argv[1])), sys.argv[2], data_root=sys.argv[3], progress=False)"
    )
    folder = tmp_path / "run"
    argv = [sys.executable, "-c", script, json.dumps(RECIPE), str(folder), str(root)]
    process = subprocess.Popen(argv, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((folder / "checkpoints").glob("*")), "the run was killed before its first checkpoint"
    run_recipe(recipe(), folder, data_root=root, progress=False)
    assert losses(folder) == losses(uninterrupted)
    whole, resumed = (from_pretrained(f / "result").state_dict() for f in (uninterrupted, folder))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_weights_of_modalities_are_learnt_and_survive_a_stop(root: Path, tmp_path: Path) -> None:
    wanted = recipe(loss={"uncertainty_lr": 0.1, "modality_weights": {"image": 2.0}}, run={"steps": 6})
    run_recipe(wanted, tmp_path / "whole", data_root=root, progress=False)
    records = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    weights = [record["image.weight"] for record in records]
    assert weights[0] == 2.0 and weights == sorted(weights, reverse=True) and weights[-1] < 1.6
    assert not any("log_variance" in name for name in from_pretrained(tmp_path / "whole" / "result").state_dict())
    last = tmp_path / "whole" / "checkpoints" / "step-00000006.pt"
    last.unlink()
    run_recipe(wanted, tmp_path / "whole", data_root=root, progress=False)
    again = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert last.exists() and [record["image.weight"] for record in again[-3:]] == weights[3:]


def test_dropout_is_of_training_alone_and_survives_a_stop(root: Path, uninterrupted: Path, tmp_path: Path) -> None:
    wanted = recipe(model={"dropout": 0.3, "input_dropout": {"image": 0.3}}, run={"steps": 6})
    run_recipe(wanted, tmp_path / "whole", data_root=root, progress=False)
    first = losses(tmp_path / "whole")
    assert first[1] != losses(uninterrupted)[1]
    (tmp_path / "whole" / "checkpoints" / "step-00000006.pt").unlink()
    run_recipe(wanted, tmp_path / "whole", data_root=root, progress=False)
    assert losses(tmp_path / "whole") == first
    saved = from_pretrained(tmp_path / "whole" / "result")
    assert saved.state_dict().keys() == from_pretrained(uninterrupted / "result").state_dict().keys()
    batch = PackedBatches(ShardDataset(root / "shards"), rows=1, budget=64).batch(0)
    assert torch.equal(saved.train()(batch)[0], saved.eval()(batch)[0])
    frozen = ModelChoice(start=str(tmp_path / "whole" / "result"), train="head", dropout=0.3).model(saved.config.layout).train()
    assert torch.equal(frozen(batch)[0], saved(batch)[0]) and not torch.equal(frozen(batch)[1], saved(batch)[1])


def test_goes_on_from_a_saved_model(root: Path, uninterrupted: Path, tmp_path: Path) -> None:
    started = recipe(model={"preset": "", "start": str(uninterrupted / "result")}, run={"steps": 2}, optim={"lr": 1e-4})
    run_recipe(started, tmp_path / "more", data_root=root, progress=False)
    assert losses(tmp_path / "more")[1] < losses(uninterrupted)[2]


def test_adds_draft_heads_to_a_frozen_model(root: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    run_recipe(recipe(model={"head": {"type": "next"}}, run={"steps": 4}), plain, data_root=root, progress=False)
    heads = {"preset": "", "start": str(plain / "result"), "head": {"type": "sequential", "mtp_depth": 2}, "train": "head"}
    run_recipe(recipe(model=heads), tmp_path / "heads", data_root=root, progress=False)
    records = [json.loads(line) for line in (tmp_path / "heads" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["image+2"] < 0.8 * records[0]["image+2"]
    before, after = (from_pretrained(f / "result").state_dict() for f in (plain, tmp_path / "heads"))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(name.startswith("head.depths.1.") for name in after.keys() - before.keys())


def test_draft_heads_learn_what_the_frozen_model_says(root: Path, uninterrupted: Path, tmp_path: Path) -> None:
    drafts = {"preset": "", "start": str(uninterrupted / "result"), "head": {"type": "shared", "mtp_depth": 2}, "train": "head"}
    run_recipe(recipe(model=drafts, loss={"mtp_distill": 1.0}), tmp_path / "run", data_root=root, progress=False)
    first, *_, last = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for name in ("image+1", "image+2"):
        assert last[f"{name}.kl"] < 0.8 * first[f"{name}.kl"]
        assert last[f"{name}.acceptance"] > first[f"{name}.acceptance"]
    assert last["image"] != 0 and "image.kl" not in last


@pytest.mark.usefixtures("block_registered")
def test_refuses_a_model_of_another_vocabulary(root: Path, uninterrupted: Path, tmp_path: Path) -> None:
    other = BlockTokenizer(BlockTokenizer.Config(levels=4))
    tokenize(root / "pictures", tmp_path / "shards", tokenizer=other, config=TokenizeConfig(max_dim=8))
    started = recipe(model={"preset": "", "start": str(uninterrupted / "result")})
    with pytest.raises(
        VocabMismatch, match=r"the shards: image tokenizer is .*sizes \[4, 4, 4\]\), but .*sizes \[5, 5, 5\]\) is wanted, as in .*result$"
    ):
        run_recipe(started, tmp_path / "run", data_root=tmp_path, progress=False)


def test_trains_on_a_part_of_the_media_that_a_model_knows(root: Path, uninterrupted: Path, tmp_path: Path) -> None:
    wide = ModelChoice(start=str(uninterrupted / "result"), head={"type": "next"})
    speech = VocabLayout(None, (MediaEntry(Modality.AUDIO, "speech", "f", (40,)),))
    save_pretrained(wide.model(wide.layout(speech)), tmp_path / "wide")
    run_recipe(
        recipe(model={"preset": "", "start": str(tmp_path / "wide")}, run={"steps": 2}), tmp_path / "run", data_root=root, progress=False
    )
    assert from_pretrained(tmp_path / "run" / "result").config.layout == read_config(tmp_path / "wide").layout
    assert losses(tmp_path / "run")[1] < losses(uninterrupted)[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"presett": "tiny"}}, "model: unknown key 'presett'; did you mean 'preset'"),
        ({"model": {"input_dropout": {"image": 1.0}}}, "model: input_dropout.image 1 is a share; at least 0 and less than 1 is wanted"),
        ({"model": {"input_dropout": {"smell": 0.1}}}, "model.input_dropout: 'smell' is no modality"),
        ({"model": {"dropout": 1.0}}, "model: dropout 1 is a share; at least 0 and less than 1 is wanted"),
        ({"model": {"attention": "flex"}}, "attention = 'flex' is for accelerators"),
        ({"model": {"preset": "tinny"}}, "no model preset is called 'tinny'"),
        ({"model": {"preset": ""}}, "give either 'preset' or 'start'"),
        ({"model": {"backbone": {"widht": 3}}}, "unknown key 'widht'; did you mean 'width'"),
        ({"data": {"shard": ["x"]}}, "data: unknown key 'shard'; did you mean 'shards'"),
        ({"loss": {"mtp_weigth": 1.0}}, "loss: unknown key 'mtp_weigth'; did you mean 'mtp_weight'"),
        ({"model": {"head": {"type": "next"}, "train": "head"}}, "this head has nothing to learn"),
        ({"model": {"head": {"type": "seqential"}}}, "no head is called 'seqential'; did you mean 'sequential'"),
    ],
)
def test_names_what_is_wrong_in_a_recipe(root: Path, tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_recipe(recipe(**changes), tmp_path / "run", data_root=root, progress=False)
