"""The recipes of docs/training.md, one after the other, as they stand but for their size."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtp.config import ConfigError, from_dict
from mmtp.data.encode import TokenizeConfig
from mmtp.data.job import tokenize
from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.data.media import encode_png
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.loss import LossConfig
from mmtp.models.presets import preset
from mmtp.registry import REGISTRY
from mmtp.stream.vocab import VocabLayout
from mmtp.testing.fakes import BlockTokenizer
from mmtp.tokenizers.continuous.patches import PatchImageTokenizer
from mmtp.tokenizers.text import TextTokenizer
from mmtp.train.model_choice import ModelChoice
from mmtp.train.recipe import load_recipe, run_recipe
from mmtp.types import Modality

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
STAGES = dict(re.findall(r"^```toml\n# (\w+)\.toml: (?s:.*?)\n(task = (?s:.*?))^```", PAGE.read_text("utf-8"), re.M))
SMALL = ["run.steps=6", "run.batch=4", "run.log_every=1", "optim.warmup=1", "optim.lr=1e-2", "data.budget=96"]
COLOURS = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0), "green": (0.0, 1.0, 0.0)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets under the names that the recipes give them."""
    root = tmp_path_factory.mktemp("stages")
    names = list(COLOURS)
    for name, colour in COLOURS.items():
        (root / f"{name}.png").write_bytes(encode_png(torch.tensor(colour)[:, None, None].expand(3, 16, 16)))

    def manifest(path: str, pictures: list[str], answers: list[str]) -> Path:
        lines = [
            {"key": name, "image": f"{picture}.png", "caption": f"a {name} square", "questions": [["what color?", answer]]}
            for name, picture, answer in zip(names, pictures, answers, strict=True)
        ]
        (root / path).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return root / path

    true, others = manifest("true.jsonl", names, names), names[1:] + names[:1]
    wrong_answers, wrong_pictures = manifest("answers.jsonl", names, others), manifest("pictures.jsonl", others, names)
    block, patches = BlockTokenizer(BlockTokenizer.Config()), PatchImageTokenizer.Config(patch=8).build()
    text = TextTokenizer.train(["what color? red blue green", "draw a red square"] * 3, 280)
    made = {
        "captions": (true, block, "caption"),
        "drawings": (true, block, "draw"),
        "words": (true, patches, "vqa-blind"),
        "seen-captions": (true, patches, "caption"),
        "seen-questions": (true, patches, "vqa"),
        "answers-chosen": (true, block, "vqa"),
        "answers-rejected": (wrong_answers, block, "vqa"),
        "drawings-chosen": (true, block, "draw"),
        "drawings-rejected": (wrong_pictures, block, "draw"),
    }
    with pytest.MonkeyPatch.context() as patch:
        register_block(patch)
        for name, (source, tokenizer, task) in made.items():
            tokenize(source, root / "runs" / name, tokenizer=tokenizer, text=text, config=TokenizeConfig(tasks=(task,), max_dim=8))
    return root


def register_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(REGISTRY, "_families", {family: dict(entries) for family, entries in REGISTRY._families.items()})
    REGISTRY.register("tokenizer", "block", "mmtp.testing.fakes:BlockTokenizer")


def train(root: Path, stage: str, *changes: str, name: str = "") -> tuple[dict, dict]:
    """Runs a stage of the page in ``runs/STAGE``; gives the first and the last record of its log."""
    path = root / f"{stage}.toml"
    path.write_text(STAGES[stage])
    run_recipe(load_recipe(path, [*SMALL, *changes]), root / "runs" / (name or stage), data_root=root, progress=False)
    first, *_, last = [json.loads(line) for line in (root / "runs" / (name or stage) / "log.jsonl").read_text().splitlines()]
    return first, last


FEATURES = ["embedding.features.layers.0.weight", "embedding.features.layers.0.bias"]


def changed(before: Path, after: Path) -> set[str]:
    """Names of the weights of ``before`` that are others in ``after``, and of those that are new."""
    one, other = (from_pretrained(folder).state_dict() for folder in (before, after))
    return {name for name, value in other.items() if name not in one or not torch.equal(one[name], value)}


@pytest.fixture
def runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)
    return root / "runs"


def test_the_page_has_all_stages() -> None:
    assert list(STAGES) == ["multimodal", "joint", "alignment", "instruction", "preference", "drafts"]


def test_a_model_that_draws(root: Path, runs: Path) -> None:
    first, last = train(root, "joint", "model.preset='tiny'")
    assert last["image"] < first["image"] and last["text"] < first["text"]

    first, last = train(root, "preference", "run.steps=32")
    assert last["margin"] > 0 and last["text.accuracy"] == last["image.accuracy"] == 1
    moved = changed(runs / "joint" / "result", runs / "preference" / "result")
    assert moved and not any(name.startswith("head.") for name in moved)

    first, last = train(root, "drafts")
    assert last["image+1.kl"] < first["image+1.kl"]
    moved = changed(runs / "preference" / "result", runs / "drafts" / "result")
    assert moved and all(name.startswith("head.") for name in moved)
    assert from_pretrained(runs / "drafts" / "result").head.mtp_depth == 4


def test_a_model_of_words_that_gets_eyes(root: Path, runs: Path) -> None:
    train(root, "joint", "model.preset='tiny'", "data.shards=['runs/words']", "data.weights=[]", "loss.inputs=['text']", name="words")
    assert from_pretrained(runs / "words" / "result").config.feature_width == 0

    first, last = train(root, "alignment")
    assert last["text"] < first["text"]
    assert changed(runs / "words" / "result", runs / "alignment" / "result") == {
        "embedding.features.layers.0.weight",
        "embedding.features.layers.0.bias",
    }

    first, last = train(root, "instruction")
    assert last["text"] < first["text"]
    assert {FEATURES[0], "backbone.norm.weight"} < changed(runs / "alignment" / "result", runs / "instruction" / "result")


def test_instruction_counts_answers_alone_and_joint_training_everything(root: Path, runs: Path) -> None:
    batch = PackedBatches(ShardDataset(runs / "answers-chosen"), rows=1, budget=96).batch(0)
    net = preset("tiny", ShardDataset(runs / "answers-chosen").layout).build()
    losses = (from_dict(LossConfig, tomllib.loads(STAGES[stage]).get("loss", {}), "loss") for stage in ("instruction", "joint"))
    answers, everything = (net.loss(batch, config).counts for config in losses)
    free = torch.tensor([slot.size > 1 for slot in net.config.layout.slots])[batch.slots]
    assert answers[Modality.TEXT, 0] == int((free & batch.loss_mask).sum())
    assert (Modality.IMAGE, 0) not in answers
    first = torch.nn.functional.pad(batch.document_ids, (1, 0), value=-1)[:, :-1] != batch.document_ids
    assert sum(count for (_, offset), count in everything.items() if offset == 0) == int((free & ~first & (batch.document_ids >= 0)).sum())


def test_a_vocabulary_without_the_continuous_tokenizer_goes_on(root: Path, runs: Path) -> None:
    dataset = ShardDataset(runs / "seen-captions")
    layout = VocabLayout(dataset.layout.text, (), dataset.layout.max_dim)
    save_pretrained(preset("tiny", layout).build(), runs / "text-only")
    choice = ModelChoice(start=str(runs / "text-only"), train="features")
    net = choice.model(dataset.layout, dataset.feature_width)
    assert net.config.layout == dataset.layout
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        "embedding.features.layers.0.weight",
        "embedding.features.layers.0.bias",
    ]
    before = from_pretrained(runs / "text-only").state_dict()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_what_does_not_fit_is_one_line(root: Path, runs: Path) -> None:
    dataset, drawings = ShardDataset(runs / "seen-captions"), ShardDataset(runs / "drawings")
    assert (dataset.feature_width, drawings.feature_width) == (192, 0)
    with pytest.raises(ConfigError, match="train = 'features', but the shards hold no continuous features"):
        ModelChoice(preset="tiny", train="features").model(drawings.layout, 0)
    layout = VocabLayout(dataset.layout.text, (), dataset.layout.max_dim)
    save_pretrained(replace(preset("tiny", layout), head=SynchronizedHead.Config()).build(), runs / "sync")
    with pytest.raises(ConfigError, match="of the model's head is for fewer media; give 'head'"):
        ModelChoice(start=str(runs / "sync")).model(dataset.layout, 192)
    assert ModelChoice(start=str(runs / "sync"), head={"type": "next"}).model(dataset.layout, 192).config.feature_width == 192
