import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtp.data.encode import TokenizeConfig
from mmtp.data.job import tokenize
from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.models.presets import preset
from mmtp.registry import REGISTRY
from mmtp.testing.fakes import BlockTokenizer
from mmtp.tokenizers.continuous.patches import PatchImageTokenizer
from mmtp.tokenizers.text import TextTokenizer

NAMES = ("sequential", "synchronized, rows", "sequential, distilled")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and two data sets of twelve pictures each."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REGISTRY, "_families", {family: dict(entries) for family, entries in REGISTRY._families.items()})
        REGISTRY.register("tokenizer", "block", "mmtp.testing.fakes:BlockTokenizer")
        make_shards(folder)
    save_pretrained(preset("tiny", ShardDataset(folder / "train").layout).build(), folder / "model")
    return folder


def make_shards(folder: Path) -> None:
    for name in ("train", "held-out"):
        (folder / f"{name}-pictures").mkdir()
        for i in range(12):
            picture = Image.new("RGB", (16, 12), ((i % 4) * 80, 255, 0))
            picture.save(folder / f"{name}-pictures" / f"{i:02}.png")
        block = BlockTokenizer(BlockTokenizer.Config())
        tokenize(folder / f"{name}-pictures", folder / name, tokenizer=block, config=TokenizeConfig(max_dim=8))


def command(world: Path, out: Path, *more: str) -> list[str]:
    data = ["--train", str(world / "train"), "--held-out", str(world / "held-out"), "--out", str(out)]
    sizes = ["--steps", "2", "--rows", "2", "--budget", "64", "--prompts", "2", "--limit", "20", "--mtp-depth", "2", "--seeds", "1"]
    return [str(world / "model"), *data, *sizes, *more]


def test_heads_of_equal_size_are_measured_once(script, world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    script.main(command(world, out, "--variants", *NAMES, "--plot", str(tmp_path / "plot.png")))
    lines = (out / "results.jsonl").read_text().splitlines()
    records = {record["variant"]: record for record in map(json.loads, lines)}
    assert tuple(records) == NAMES
    sizes = [record["parameters"] for record in records.values()]
    assert max(sizes) < 1.05 * min(sizes)
    for name, record in records.items():
        below = name == "synchronized, rows"
        assert record["tasks"]["plain"]["equal"] == [2, 2] and 1 <= record["tasks"]["plain"]["tokens_per_pass"] <= 11
        assert {"image+1", "image+2"} <= record["overlap"].keys() and ("imagebelow" in record["overlap"]) == below
        assert all(0 <= share <= 1 for share in record["overlap"].values())
        assert (
            record["loss"].keys() - record["overlap"].keys() == {"image", "text"}
            and record["loss"]["image"] == records["sequential"]["loss"]["image"]
        )
    tables = capsys.readouterr().out
    assert tables.count("| synchronized, rows |") == 4 and "| drafts accepted, plain | image+1 | image+2 |" in tables
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    # Neither what is measured nor what is trained is so again.
    script.main(command(world, out, "--variants", *NAMES))
    assert (out / "results.jsonl").read_text().splitlines() == lines and capsys.readouterr().out == tables
    (out / "results.jsonl").write_text(lines[0] + "\n")
    monkeypatch.setattr(script, "train", None)
    script.main(command(world, out, "--variants", *NAMES))
    assert (out / "results.jsonl").read_text().splitlines() == lines


def test_what_a_head_learns_does_not_depend_on_its_company(script, world):
    model = from_pretrained(world / "model").eval().requires_grad_(False)
    batches = PackedBatches([ShardDataset(world / "train")], rows=2, budget=64)

    def trained(*names: str) -> torch.Tensor:
        learners = [script.Learner(next(v for v in script.VARIANTS if v.name == name), model, 2, 0, 0.5) for name in names]
        script.train(learners, model, batches, 2, 0)
        return torch.cat([p.detach().flatten() for p in learners[-1].head.parameters()])

    assert torch.equal(trained("sequential"), trained("shared, thin", "sequential"))


def test_backbones_may_train_beside_heads_and_with_them(script, world, tmp_path):
    names = ("sequential", "sequential, detached", "sequential, joint")
    script.main(command(world, tmp_path, "--prompts", "1", "--limit", "9", "--batches", "1", "--variants", *names))
    frozen, detached, joint = script.read_results(tmp_path / "results.jsonl", {})
    assert len({record["loss"]["image"] for record in (frozen, detached, joint)}) == 3
    assert all(record["tasks"]["plain"]["equal"] == [1, 1] for record in (frozen, detached, joint))
    assert frozen["parameters"] == joint["parameters"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "synchronised"], "--variants: there is no 'synchronised'; did you mean 'synchronized'?"),
        (["--variants", "synchronized, vectors masked"], "did you mean 'synchronized, "),  # of models that read vectors
        (["--steps", "3"], "results.jsonl: results with --steps 2, and 3 is wanted; give another --out"),
    ],
)
def test_mistakes_are_named(script, world, tmp_path, capsys, more, message):
    (tmp_path / "results.jsonl").write_text('{"variant": "sequential", "seed": 0, "steps": 2}\n')
    with pytest.raises(SystemExit):
        script.main(command(world, tmp_path, *more))
    assert message in capsys.readouterr().err


def test_what_is_called_thin_has_the_backbones_width(script, world):
    model = from_pretrained(world / "model")
    thin = next(v for v in script.VARIANTS if v.thin)
    head = script.build_head(thin, model, 4)
    wide = script.build_head(next(v for v in script.VARIANTS if v.name == "shared"), model, 4)
    assert script.parameters(head) < 0.5 * script.parameters(wide)


def test_what_heads_read_in_place_of_vectors_is_compared_on_models_that_read_them(script, tmp_path):
    save_pretrained(TextTokenizer.train(["a picture of red", "a picture of green"] * 4, 270), tmp_path / "text")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), ((i % 4) * 80, 255, 0)).save(pictures / f"{i:02}.png")
        (pictures / f"{i:02}.txt").write_text("a picture of red")
    patches = PatchImageTokenizer.Config(patch=8).build()
    config = TokenizeConfig(tasks=("caption",), max_dim=8)
    tokenize(pictures, tmp_path / "data", tokenizer=patches, text=tmp_path / "text", config=config)
    layout = ShardDataset(tmp_path / "data").layout
    save_pretrained(replace(preset("tiny", layout), feature_width=patches.spec.latent_dim).build(), tmp_path / "model")
    data = ["--train", str(tmp_path / "data"), "--held-out", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    sizes = ["--steps", "4", "--rows", "2", "--budget", "64", "--prompts", "2", "--limit", "8", "--mtp-depth", "1", "--seeds", "1"]
    names = [v.name for v in script.VARIANTS if "continuous" in v.head]
    script.main([str(tmp_path / "model"), *data, *sizes, "--variants", *names])
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(records) == 4 and len({record["loss"]["text+1"] for record in records}) == 4
    assert all(record["tasks"]["caption"]["equal"] == [2, 2] for record in records)
