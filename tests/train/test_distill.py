import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtp.config import from_dict
from mmtp.data.errors import DataError
from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.data.teacher_cache import PictureCache, WordCache
from mmtp.hub import from_pretrained
from mmtp.train.distill import TaughtBatches
from mmtp.train.losses.teachers import LIMIT, TeachersConfig
from mmtp.train.model_trainer import train_model
from mmtp.train.recipe import Recipe, run_recipe
from mmtp.types import Modality

TEACHERS = {"image": {"teacher": "eye"}, "text": {"teacher": "tongue"}, "reference": 4}
RECIPE = {
    "task": "model",
    "model": {"preset": "tiny"},
    "data": {"shards": ["shards"], "budget": 64},
    "loss": {"distill": TEACHERS},
    "optim": {"lr": 3e-3, "warmup": 2},
    "run": {"steps": 10, "batch": 4, "seed": 3, "log_every": 1, "checkpoint_every": 5},
}


def recipe(**changes: dict) -> Recipe:
    return Recipe.from_dict({key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in RECIPE.items()})


def records(folder: Path) -> list[dict[str, float]]:
    """Of every step the last one, without what the clock says."""
    found = {record["step"]: record for record in map(json.loads, (folder / "log.jsonl").read_text().splitlines())}
    return [{k: v for k, v in record.items() if "second" not in k} for record in found.values()]


@pytest.fixture(scope="module")
def whole(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_recipe(recipe(), folder, data_root=taught, progress=False)
    return folder


def test_a_model_learns_from_both(whole: Path, taught: Path, tmp_path: Path) -> None:
    first, *_, last = found = records(whole)
    assert last["distill.image"] < 0.9 * first["distill.image"] and last["distill.text"] < 0.9 * first["distill.text"]
    assert last["distill.image.cosine"] > first["distill.image.cosine"] and last["loss"] < first["loss"]
    for record in found:
        assert record["distill.ratio"] == pytest.approx(record["distill.image.grad"] / record["distill.text.grad"], rel=1e-5)
    run_recipe(Recipe.from_dict(RECIPE | {"loss": {}}), tmp_path / "alone", data_root=taught, progress=False)
    alone = records(tmp_path / "alone")
    assert alone[0]["text"] == pytest.approx(first["text"]) and alone[-1]["text"] != last["text"]
    assert not any(key.startswith("distill") for key in alone[-1])


def test_what_the_teachers_needed_is_no_part_of_the_result(whole: Path) -> None:
    model = from_pretrained(whole / "result")
    assert not any("adapter" in name or "balance" in name for name in model.state_dict())
    state = torch.load(whole / "checkpoints" / "step-00000010.pt", weights_only=False)
    assert {"reader.mean", "reader.adapter.1.weight", "balance.means"} <= state["criterion"].keys()
    assert state["criterion"]["balance.seen"].tolist() == [4, 4]


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(whole: Path, taught: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = records(whole)
    (tmp_path / "run" / "checkpoints" / "step-00000010.pt").unlink()
    shutil.rmtree(tmp_path / "run" / "result")
    run_recipe(recipe(), tmp_path / "run", data_root=taught, progress=False)
    assert records(tmp_path / "run") == before
    ours, theirs = (from_pretrained(folder / "result").state_dict() for folder in (whole, tmp_path / "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_said_travels_with_its_documents(taught: Path) -> None:
    dataset = ShardDataset(taught / "shards")
    for world in (1, 2):
        for rank in range(world):
            packed = PackedBatches([dataset], rows=4, budget=64, seed=5, world_size=world, rank=rank)
            batches = TaughtBatches(packed, from_dict(TeachersConfig, TEACHERS, "distill"))
            caches = PictureCache(dataset, "eye"), WordCache(dataset, "tongue")
            batch = batches.batch(1)
            tokens, layout = batch.rows.tokens.flatten(), dataset.layout
            assert batch.seen is not None and batch.said is not None
            # The language teacher never speaks of codes, the visual one of nothing else.
            lo, hi = layout.text_range
            assert ((tokens[batch.said.places] >= lo) & (tokens[batch.said.places] < hi)).all()
            low, high = layout.code_range(Modality.IMAGE)
            assert torch.equal(batch.seen.places, ((tokens >= low) & (tokens < high)).nonzero()[:, 0])
            placed = list(packed.placed(1))
            assert len({start // 64 for _, _, start in placed}) == 4 // world and len(placed) > 4 // world
            seen = said = 0
            for _, index, start in placed:
                own = torch.from_numpy(dataset[index].tokens)
                assert torch.equal(tokens[start : start + len(own)], own)
                offsets, features = caches[0].features(index)
                part = slice(seen, seen + len(offsets))
                np.testing.assert_array_equal(batch.seen.places[part] - start, offsets)
                np.testing.assert_array_equal(batch.seen.features[part], features)
                seen += len(offsets)
                words = caches[1].distributions(index)
                part = slice(said, said + len(words.offsets))
                np.testing.assert_array_equal(batch.said.places[part] - start, words.offsets)
                np.testing.assert_array_equal(batch.said.ids[part], words.ids)
                said += len(words.offsets)
            assert (seen, said) == (len(batch.seen.places), len(batch.said.places))


def test_one_teacher_will_do(taught: Path, tmp_path: Path) -> None:
    for name, other in (("image", "text"), ("text", "image")):
        wanted = recipe(loss={"distill": {name: TEACHERS[name]}}, run={"steps": 2})
        run_recipe(wanted, tmp_path / name, data_root=taught, progress=False)
        record = records(tmp_path / name)[-1]
        assert f"distill.{name}" in record and f"distill.{other}" not in record and "distill.ratio" not in record


def test_the_greater_gradient_is_scaled_down(taught: Path, tmp_path: Path) -> None:
    heavy = {"image": {"teacher": "eye", "weight": 50.0}, "text": {"teacher": "tongue"}}
    wanted = recipe(loss={"distill": heavy, "mtp_weight": 0.0, "z_weight": 0.0}, run={"steps": 1})
    run_recipe(wanted, tmp_path / "run", data_root=taught, progress=False)
    (record,) = records(tmp_path / "run")
    assert record["distill.ratio"] > LIMIT
    # Beside the data's loss: the visual teacher's 50, scaled down so that its gradient is twice the other's, and the other's 1.
    assert record["loss"] == pytest.approx(record["text"] + record["image"] + 50 * LIMIT / record["distill.ratio"] + 1, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"distill": {"text": {"teacher": "eye"}}}}, "eye: this teacher was asked about image, and is to teach text"),
        ({"loss": {"distill": {"text": {"teacher": "gpt"}}}}, "gpt: no teacher has been asked; run: mmtp teach .*shards --teacher gpt"),
        ({"loss": {"distill": {"txt": {}}}}, "loss.distill: unknown key 'txt'; did you mean 'text'"),
        ({"loss": {"uncertainty_lr": 0.1}}, "leave it out, or 'distill'"),
        ({"model": {"train": "head"}}, "loss.distill: teachers speak to the backbone, and train = 'head' freezes it"),
    ],
)
def test_what_cannot_be_is_refused(taught: Path, tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_recipe(recipe(**changes), tmp_path / "run", data_root=taught, progress=False)


def test_several_processes_are_refused(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtp.train.model_trainer.processes", lambda: 2)
    with pytest.raises(ValueError, match="loss.distill: models with teachers are trained by one process"):
        train_model(recipe(), tmp_path / "run", data_root=taught, progress=False)


def test_data_that_have_changed_are_refused(taught: Path, tmp_path: Path) -> None:
    shutil.copytree(taught / "shards", tmp_path / "shards")
    head = tmp_path / "shards" / "teachers" / "tongue" / "teacher.json"
    head.write_text(json.dumps(json.loads(head.read_text()) | {"dataset": "0" * 16}))
    with pytest.raises(DataError, match="tongue: belongs to data with fingerprint 0{16}, and .*shards has [0-9a-f]{16}; remove"):
        run_recipe(recipe(), tmp_path / "run", data_root=tmp_path, progress=False)
