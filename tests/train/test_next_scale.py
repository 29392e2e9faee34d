"""Pictures that are written scale by scale, from files over a recipe to files again."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtp import cli
from mmtp.config import ConfigError
from mmtp.data.loader import ShardDataset
from mmtp.data.media import decode_image, encode_png
from mmtp.decode.rows import Row
from mmtp.decode.sample import Sampling
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.models.presets import preset
from mmtp.pipeline import Pipeline
from mmtp.stream.vocab import VocabLayout
from mmtp.testing.fakes import BlockTokenizer
from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.quantizers import MultiScaleVQ
from mmtp.tokenizers.text import TextTokenizer
from mmtp.train.model_choice import ModelChoice
from mmtp.train.recipe import Recipe, run_recipe

RECIPE = """task = "model"
[model]
preset = "tiny"
next_scale = true
codebook_init = true
[data]
shards = ["tokens"]
budget = 64
[loss]
inputs = ["text"]
[optim]
lr = 1e-2
warmup = 5
[run]
steps = 90
batch = 3
log_every = 40
"""
NAMES = ("stripes", "dots")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers, two pictures with captions, their shards, and a model that has learnt them."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 16, 16)
    quantizer = MultiScaleVQ.Config(scales=(1, 2, 4), codebook_size=24, codebook_dim=6, convolutions=2)
    pyramid = ConvImageTokenizer.Config(patch=2, widths=(8, 12), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=quantizer).build()
    pyramid(torch.rand(8, 3, 16, 16) * 2 - 1)  # starts the codebook
    save_pretrained(pyramid.eval(), home / "pyramid")
    save_pretrained(TextTokenizer.train([f"draw {name}" for name in NAMES] * 4, 290), home / "words")
    (home / "pictures").mkdir()
    for name, picture in zip(NAMES, pictures, strict=True):
        (home / "pictures" / f"{name}.png").write_bytes(encode_png(picture))
        (home / "pictures" / f"{name}.txt").write_text(name)
    (home / "recipe.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        argv = ["tokenize", "pictures", "--tokenizer", "pyramid", "--text", "words", "--task", "draw", "--task", "caption"]
        assert cli.run([*argv, "--max-dim", "21", "--workers", "1", "--out", "tokens"]) == 0
        assert cli.run(["train", "recipe.toml", "--run-dir", "run", "--data-root", "."]) == 0
    return home


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def seen(name: str) -> torch.Tensor:
    """A picture as the tokenizer gives it back."""
    tokenizer = from_pretrained("pyramid")
    return tokenizer.decode(tokenizer.encode([decode_image(Path(f"pictures/{name}.png").read_bytes())]))[0]


def test_words_become_pictures_scale_by_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = []
    take = Row.take_draft
    monkeypatch.setattr(Row, "take_draft", lambda row, *given: drafted.append(row.draft_states[-1].codebook) or take(row, *given))
    pipeline = Pipeline.from_pretrained("run/result", draft_cost=0)  # a step of so small a model's head costs nearly a pass
    for exact in (False, True):
        pipeline.engine.exact = exact
        for name in NAMES:
            prompt, greedy = pipeline.draw_prompt(name), Sampling(temperature=0.0)
            plain, fast = (pipeline.engine.generate(prompt, greedy, 64, speculative) for speculative in (False, True))
            assert fast.tokens == plain.tokens and fast.stats.passes < plain.stats.passes
            torch.testing.assert_close(pipeline.drawn(plain)[0], seen(name))
            assert [n for n in plain.stats.per_pass if n > 1] == [4, 16]
    assert set(drafted) == {-1}  # words, openers, dims and closers, but no code
    torch.testing.assert_close(torch.stack(pipeline.draw(NAMES, temperature=0.0)), torch.stack([seen(name) for name in NAMES]))
    pictures = [decode_image(Path(f"pictures/{name}.png").read_bytes()) for name in NAMES]
    assert pipeline.caption(pictures) == list(NAMES)


def test_the_command_line_draws_and_decodes(tmp_path: Path) -> None:
    assert cli.run(["generate", "run/result", "draw dots", "--temperature", "0", "--out", str(tmp_path / "dots.png")]) == 0
    drawn = decode_image((tmp_path / "dots.png").read_bytes())
    assert float((drawn - seen("dots")).abs().max()) < 1 / 255
    argv = ["decode", "tokens", "--out", str(tmp_path / "files"), "--tokenizer", "pyramid", "--tokenizer", "words"]
    assert cli.run(argv) == 0
    assert cli.run(["inspect", "tokens"]) == 0
    with Image.open(tmp_path / "files" / "dots.png") as picture:
        assert picture.size == (16, 16)


def test_a_model_takes_over_the_pyramid_of_its_tokenizer(tmp_path: Path) -> None:
    layout, quantizer = ShardDataset(Path("tokens")).layout, from_pretrained("pyramid").quantizer
    learnt = from_pretrained("run/result").next_scale
    assert torch.equal(learnt.codebook, quantizer.vq.codebook) and torch.equal(learnt.kernels[1], quantizer.smooth[1].weight)
    raster = preset("tiny", layout).build()
    save_pretrained(raster, tmp_path)
    begun = ModelChoice(start=str(tmp_path), next_scale=True).model(layout)
    assert torch.equal(begun.next_scale.codebook, quantizer.vq.codebook)
    assert torch.equal(begun.backbone.blocks[0].mlp.down.weight, raster.backbone.blocks[0].mlp.down.weight)
    assert dataclasses.replace(begun.config, next_scale=None) == raster.config
    save_pretrained(begun, tmp_path / "next")
    assert ModelChoice(start=str(tmp_path / "next")).model(layout).config.next_scale == begun.config.next_scale


def test_pictures_of_one_grid_have_no_scales(tmp_path: Path, block_registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BlockTokenizer.Config(block=16, levels=3).build()
    save_pretrained(blocks, "blocks")
    with pytest.raises(ConfigError, match="the shards have pictures of 'blocks', whose codes are one grid"):
        ModelChoice(preset="tiny", next_scale=True).model(VocabLayout.of({"blocks": blocks}))
    with pytest.raises(ConfigError, match="the shards have no codes of pictures"):
        ModelChoice(preset="tiny", next_scale=True).model(VocabLayout())


def test_visual_teachers_are_refused(tmp_path: Path) -> None:
    recipe = {"task": "model", "model": {"preset": "tiny", "next_scale": True}, "data": {"shards": ["tokens"]}}
    recipe |= {"loss": {"distill": {"image": {"teacher": "eye"}}}, "optim": {"lr": 1e-3}, "run": {"steps": 1, "batch": 1}}
    with pytest.raises(ConfigError, match=r"loss.distill.image: a visual teacher"):
        run_recipe(Recipe.from_dict(recipe), tmp_path, data_root=Path(), progress=False)
