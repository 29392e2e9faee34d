import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmtp.data.encode import TokenizeConfig
from mmtp.data.job import tokenize
from mmtp.data.loader import ShardDataset
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


def test_heads_of_equal_size_are_measured_once(script, world, tmp_path):
    command = [
        str(world / "model"),
        "--train",
        str(world / "train"),
        "--held-out",
        str(world / "held-out"),
        "--out",
        str(tmp_path / "ablation-x"),
    ]
    command += [
        "--steps",
        "2",
        "--rows",
        "2",
        "--budget",
        "64",
        "--prompts",
        "2",
        "--limit",
        "20",
        "--mtp-depth",
        "2",
        "--report",
        str(tmp_path),
    ]
    script.main([*command, "--seeds", "1", "--variants", *NAMES])
    lines = (tmp_path / "ablation-x" / "results.jsonl").read_text().splitlines()
    records = {record["variant"]: record for record in map(json.loads, lines)}
    assert tuple(records) == NAMES
    sizes = [record["parameters"] for record in records.values()]
    assert max(sizes) < 1.05 * min(sizes)
    for name, record in records.items():
        assert record["tasks"]["plain"]["equal"] == [2, 2] and 1 <= record["tasks"]["plain"]["tokens_per_pass"] <= 11
        assert {"image+1", "image+2"} <= record["overlap"].keys() and ("imagebelow" in record["overlap"]) == (name == "synchronized, rows")
        assert all(0 <= share <= 1 for share in record["overlap"].values())
    table = (tmp_path / "ablation-x.md").read_text()
    assert table.count("| synchronized, rows |") == 2 and "2 of 2" in table
    assert (tmp_path / "ablation-x-image.svg").read_text().startswith("<svg")
    script.main([*command, "--seeds", "1", "--variants", *NAMES])
    assert (tmp_path / "ablation-x" / "results.jsonl").read_text().splitlines() == lines


def test_variants_are_named_in_full(script, world, tmp_path, capsys):
    command = [str(world / "model"), "--train", str(world / "train"), "--held-out", str(world / "held-out"), "--out", str(tmp_path / "x")]
    with pytest.raises(SystemExit):
        script.main([*command, "--variants", "rows"])
    assert "invalid choice: 'rows'" in capsys.readouterr().err and not (tmp_path / "x").exists()


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
    command = [str(tmp_path / "model"), "--train", str(tmp_path / "data"), "--held-out", str(tmp_path / "data")]
    command += ["--out", str(tmp_path / "out"), "--steps", "1", "--rows", "2", "--budget", "64", "--prompts", "2", "--limit", "8"]
    script.main([*command, "--mtp-depth", "1", "--seeds", "1", "--variants", *(v.name for v in script.VARIANTS if "continuous" in v.head)])
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(records) == 4 and len({record["overlap"]["text+1"] for record in records}) == 4
    assert all(record["tasks"]["caption"]["equal"] == [2, 2] for record in records)
