import json
import math
import re
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from mmtp.config import ConfigError, build_config, from_dict
from mmtp.data.media import encode_png, read_sound, write_wav
from mmtp.data.video import encode_video
from mmtp.hub import from_pretrained, zoo_entries
from mmtp.train.losses.contrast import ContrastConfig
from mmtp.train.pictures import PictureMix
from mmtp.train.recipe import Recipe, run_recipe
from mmtp.train.semantic_trainer import SemanticLossConfig
from mmtp.train.sounds import SoundData, SoundMix
from mmtp.train.tokenizer_trainer import PictureLossConfig, SoundLossConfig, usage
from mmtp.train.videos import VideoData, VideoMix
from mmtp.types import MmtpError

RECIPE = {
    "task": "tokenizer",
    "tokenizer": {
        "type": "image-conv",
        "patch": 4,
        "widths": [16],
        "encoder_blocks": [1],
        "decoder_blocks": [1],
        "quantizer": {"type": "fsq", "levels": [5, 5, 5]},
    },
    "data": {"size": 16, "sources": [{"source": "pictures", "flips": "all"}]},
    "optim": {"lr": 3e-3, "warmup": 5, "ema": 0.9},
    "run": {"steps": 60, "batch": 8, "log_every": 10, "preview_every": 50},
}

VIDEO_RECIPE = {
    "task": "tokenizer",
    "tokenizer": {
        "type": "video-conv",
        "patch": 4,
        "widths": [16],
        "time_strides": [],
        "encoder_blocks": [1],
        "decoder_blocks": [1],
        "quantizer": {"type": "fsq", "levels": [5, 5, 5]},
    },
    "data": {
        "size": 16,
        "frames": 3,
        "sources": [{"source": "videos"}, {"source": "pictures", "media": "panned-pictures", "crop": [0.5, 1.0], "flips": "all"}],
    },
    "optim": {"lr": 3e-3, "warmup": 5, "ema": 0.9},
    "run": {"steps": 40, "batch": 4, "log_every": 10, "preview_every": 40},
}

SOUND_RECIPE = {
    "task": "tokenizer",
    "tokenizer": {
        "type": "audio-frame",
        "sample_rate": 4000,
        "window": 128,
        "hop": 32,
        "width": 16,
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "quantizer": {"type": "residual-vq", "num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4},
    },
    "data": {"seconds": 0.2, "sources": [{"source": "sounds"}]},
    "loss": {"windows": [64, 256], "bands": [10, 40]},
    "optim": {"lr": 3e-3, "warmup": 5, "ema": 0.9},
    "run": {"steps": 60, "batch": 8, "log_every": 10, "preview_every": 50},
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "sounds").mkdir()
    for i in range(6):
        tone = 0.4 * torch.sin(2 * math.pi * (200 + 100 * i) / 4000 * torch.arange(2000.0))
        write_wav(tmp_path / "sounds" / f"{i}.wav", tone[None], 4000)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        picture = torch.full((3, 16, 16), 0.9)
        picture[i % 3, 2:10, 4:12] = 0.1
        (tmp_path / "pictures" / f"{i}.png").write_bytes(encode_png(picture))
    (tmp_path / "videos").mkdir()
    for i in range(3):
        video = torch.full((3, 6, 16, 16), 0.9)
        for t in range(6):
            video[i, t, 2:10, t : t + 8] = 0.1
        (tmp_path / "videos" / f"{i}.gif").write_bytes(encode_video(video, 8, "gif"))
    return tmp_path


def test_a_recipe_becomes_a_tokenizer(root):
    result = run_recipe(Recipe.from_dict(RECIPE), root / "run", data_root=root, progress=False)
    records = [json.loads(line) for line in (root / "run/log.jsonl").read_text().splitlines()]
    assert records[-1]["psnr"] > records[0]["psnr"] + 3
    assert records[0]["samples_per_second"] > 0
    assert (root / "run/previews/step-000050.png").is_file()
    tokenizer = from_pretrained(result)
    codes = tokenizer.encode([torch.rand(3, 16, 16)])
    assert codes.ids.shape == (1, 1, 4, 4)
    again = run_recipe(Recipe.from_dict(RECIPE), root / "run", data_root=root, progress=False)
    assert from_pretrained(again).spec == tokenizer.spec


def test_a_recipe_becomes_a_tokenizer_of_sounds(root):
    result = run_recipe(Recipe.from_dict(SOUND_RECIPE), root / "run", data_root=root, progress=False)
    found = records(root / "run")
    assert found[-1]["mel"] < 0.8 * found[0]["mel"]
    assert {"l1", "si_sdr", "usage", "usage.0", "usage.1", "usage.2", "samples_per_second"} <= set(found[-1])
    assert (root / "run/previews/step-000050.png").is_file()
    sounds = [read_sound(root / f"run/previews/step-000050-{name}.wav") for name in ("original", "reconstruction")]
    assert [(sound.shape, rate) for sound, rate in sounds] == [((1, 4 * 800), 4000)] * 2
    assert not torch.equal(sounds[0][0], sounds[1][0])
    tokenizer = from_pretrained(result)
    codes = tokenizer.encode([torch.rand(1, 100)])
    assert codes.ids.shape == (1, 3, 4)
    # The average of weights goes with the codebooks as they are: their moving average is their own.
    state = torch.load(root / "run/checkpoints/step-00000060.pt", weights_only=True)
    codebooks = [name for name in state["module"] if name.endswith(("embed", "initted"))]
    assert len(codebooks) == 6
    assert all(torch.equal(state["average"][name], state["module"][name]) for name in codebooks)
    assert all(state["average"][name].all() for name in codebooks if name.endswith("initted"))


STACK = {"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 32}
FSQ = {"type": "fsq", "levels": [5, 5, 5]}


@pytest.mark.parametrize(
    ("tokenizer", "grid"),
    [
        (
            {"quantizer": {"type": "multi-scale-vq", "scales": [1, 2, 4], "codebook_size": 16, "codebook_dim": 4, "convolutions": 2}},
            (1, 21),
        ),
        ({"quantizer": {"type": "vq", "codebook_size": 16, "codebook_dim": 4}}, (4, 4)),
        ({"type": "image-vit", "patch": 4, "tile": 16, "encoder": STACK, "decoder": STACK, "quantizer": FSQ}, (4, 4)),
        (
            {"type": "image-1d", "patch": 4, "size": [16, 16], "num_latents": 5, "encoder": STACK, "decoder": STACK, "quantizer": FSQ},
            (1, 5),
        ),
    ],
    ids=["scales", "vq", "vit", "1d"],
)
def test_every_kind_of_picture_tokenizer_trains(root, tokenizer, grid):
    base = {} if "type" in tokenizer else RECIPE["tokenizer"]
    recipe = Recipe.from_dict(RECIPE | {"tokenizer": base | tokenizer, "run": RECIPE["run"] | {"steps": 30, "preview_every": 20}})
    trained = from_pretrained(run_recipe(recipe, root / "run", data_root=root, progress=False))
    found = records(root / "run")
    assert found[-1]["loss"] < found[0]["loss"]
    assert 0 < found[-1]["usage"] <= 1
    assert trained.encode([torch.rand(3, 16, 16)]).ids.shape == (1, 1, *grid)


def test_a_recipe_becomes_a_tokenizer_of_videos(root):
    result = run_recipe(Recipe.from_dict(VIDEO_RECIPE), root / "run", data_root=root, progress=False)
    found = records(root / "run")
    assert found[-1]["psnr"] > found[0]["psnr"] + 3
    with Image.open(root / "run/previews/step-000040.png") as sheet:
        assert sheet.size == (3 * 18 + 2, 2 * 4 * 18 + 2)
    tokenizer = from_pretrained(result)
    assert tokenizer.encode([torch.rand(3, 5, 16, 16)]).ids.shape == (1, 1, 5, 4, 4)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


ADVERSARIAL = {"start": 4, "feature": 1.0, "lecam": 0.01, "lr": 1e-3}
PICTURE_PARTS = {
    "adversarial": ADVERSARIAL | {"adaptive": True, "discriminator": {"width": 4, "layers": 1}},
    "perceptual": {"network": "timm:test_resnet", "weights": "weights.safetensors", "layers": [0], "size": 0},
}
SOUND_PARTS = {
    "adversarial": ADVERSARIAL | {"discriminator": {"windows": [32, 64], "width": 4, "dilations": [1]}},
    "balance": {"decay": 0.9},
}


@pytest.mark.parametrize("medium", ["pictures", "videos", "sounds"])
def test_stopped_and_continued_equals_uninterrupted_with_every_part(root, monkeypatch, medium):
    if medium != "sounds":
        save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), root / "weights.safetensors")
        vq = {"type": "vq", "codebook_size": 16, "codebook_dim": 4}
        recipe, mix = (RECIPE, PictureMix) if medium == "pictures" else (VIDEO_RECIPE, VideoMix)
        recipe = recipe | {"tokenizer": recipe["tokenizer"] | {"quantizer": vq}, "loss": PICTURE_PARTS}
    else:
        recipe, mix = SOUND_RECIPE | {"loss": SOUND_RECIPE["loss"] | SOUND_PARTS}, SoundMix
    run = {"steps": 12, "batch": 4, "log_every": 1, "checkpoint_every": 3}
    recipe = Recipe.from_dict(recipe | {"run": run})
    run_recipe(recipe, root / "whole", data_root=root, progress=False)
    with monkeypatch.context() as patch:
        batch = mix.batch

        def stop(self, step, count):
            if step == 8:
                raise KeyboardInterrupt
            return batch(self, step, count)

        patch.setattr(mix, "batch", stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, root / "stopped", data_root=root, progress=False)
    run_recipe(recipe, root / "stopped", data_root=root, progress=False)
    whole, stopped = (
        [{k: v for k, v in r.items() if "_per_second" not in k} for r in records(root / name)] for name in ("whole", "stopped")
    )
    assert whole == stopped and len(whole) == 12
    assert ["critic" in r for r in whole] == [False] * 4 + [True] * 8
    assert ["adaptive" in r for r in whole] == ["critic" in r and medium != "sounds" for r in whole]
    states = [torch.load(root / name / "checkpoints/step-00000012.pt", weights_only=True) for name in ("whole", "stopped")]
    for part in ("module", "average", "criterion"):
        assert all(torch.equal(states[0][part][name], value) for name, value in states[1][part].items())
    assert not [name for name in states[0]["criterion"] if "perceptual" in name]
    if medium == "sounds":
        assert (states[0]["criterion"]["balancer.seen"] > 0).sum() == 4


def test_usage_does_not_count_what_dropout_left_out():
    ids = torch.tensor([[[0, 3, -1], [1, -1, -1], [1, -1, -1], [2, -1, -1]]])
    assert usage(ids, (2048, 4, 4)) == {"usage.0": 0.75, "usage.1": 1.0, "usage": 0.875}
    assert usage(torch.zeros(1, 100, 1, dtype=torch.long), (4,)) == {"usage": 0.25}
    assert usage(-torch.ones(1, 4, 1, dtype=torch.long), (4,)) == {}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"data": {"seconds": 1.0}}, "data.seconds: is for tokenizers of sounds, but 'image-conv' is one of pictures"),
        ({"loss": {"mel": 1.0}}, "loss.mel: is for tokenizers of sounds"),
        ({"data": {"size": 18}}, "data.size: 18 is no multiple of 4"),
        (
            {"tokenizer": {"quantizer": {"type": "multi-scale-vq", "scales": [1, 2, 3], "convolutions": 1}}},
            "data.size: 16 pixels high and 16 wide given, 4x4 cells, and the scales .* end with 3x3: resize or crop to 12x12",
        ),
        ({"loss": {"adversarial": {}}}, "loss.adversarial.discriminator.layers: 3 want pictures of 24 pixels"),
        ({"loss": {"adversarial": {"wieght": 1.0}}}, "loss.adversarial: unknown key 'wieght'; did you mean 'weight'"),
        ({"loss": {"adversarial": {"adaptive": True}, "balance": {}}}, "loss: balance and adversarial.adaptive both"),
        ({"data": {"sources": [{"source": "sounds"}]}}, "sounds: holds no image files"),
    ],
)
def test_combinations_that_do_not_fit_are_one_line(root, tables, message):
    recipe = Recipe.from_dict(RECIPE | {name: {**RECIPE.get(name, {}), **table} for name, table in tables.items()})
    with pytest.raises(MmtpError, match=message) as error:
        run_recipe(recipe, root / "run", data_root=root, progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"data": {"size": 16}}, "data.size: is for tokenizers of pictures, but 'audio-frame' is one of sounds"),
        ({"loss": {"perceptual": {}}}, "loss.perceptual: is for tokenizers of pictures"),
        ({"data": {"sources": [{"source": "pictures"}]}}, "pictures: holds no audio files"),
        ({"tokenizer": {"type": "text"}}, "tokenizer.type: 'text' is trained by task = 'text'"),
    ],
)
def test_combinations_that_do_not_fit_sounds(root, tables, message):
    recipe = Recipe.from_dict(SOUND_RECIPE | {n: table if n == "tokenizer" else SOUND_RECIPE[n] | table for n, table in tables.items()})
    with pytest.raises(MmtpError, match=message):
        run_recipe(recipe, root / "run", data_root=root, progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"frames": 4}, r"data.frames: 4 is not one more than a multiple of 2, the frames that a code frame stands for"),
        ({"seconds": 1.0}, "data.seconds: is for tokenizers of sounds, but 'video-conv' is one of videos"),
        ({"size": 18}, "data.size: 18 is no multiple of 8"),
        ({"sources": [{"source": "sounds"}]}, "sounds: holds no video files"),
        ({"sources": [{"source": "pictures", "media": "pictures"}]}, "data.sources.0..media: 'pictures' is not one of 'videos'"),
    ],
)
def test_combinations_that_do_not_fit_videos(root, data, message):
    shape = {"widths": [4, 4], "time_strides": [2], "encoder_blocks": [0, 0], "decoder_blocks": [0, 0]}
    recipe = VIDEO_RECIPE | {"tokenizer": VIDEO_RECIPE["tokenizer"] | shape, "data": VIDEO_RECIPE["data"] | data}
    with pytest.raises(MmtpError, match=message):
        run_recipe(Recipe.from_dict(recipe), root / "run", data_root=root, progress=False)


def test_recipes_of_the_page_are_valid():
    page = Path(__file__).parents[2] / "docs" / "training.md"
    of_tokenizers, _, _ = page.read_text(encoding="utf-8").partition("\n## Stages of a model")
    blocks = re.findall(r"^```toml\n(.*?)^```", of_tokenizers, flags=re.MULTILINE | re.DOTALL)
    whole, pyramid, _, parts, start, *vision = blocks
    assert build_config("tokenizer", tomllib.loads(pyramid)["tokenizer"]).quantizer.scales
    recipe = Recipe.from_dict(tomllib.loads(whole))
    assert build_config("tokenizer", recipe.tokenizer).sample_rate == 16000
    assert from_dict(SoundData, recipe.data).seconds == 1.0
    assert from_dict(SoundLossConfig, recipe.loss) == SoundLossConfig()
    assert tomllib.loads(start)["tokenizer"]["start"] in zoo_entries("tokenizer")
    semantic = from_dict(SemanticLossConfig, tomllib.loads("\n".join(vision))["loss"])
    assert semantic.distill and len(semantic.distill.teachers) == 2 and semantic.contrast == ContrastConfig()
    page = Path(__file__).parents[2] / "docs" / "video.md"
    (text,) = re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    films = Recipe.from_dict(tomllib.loads(text))
    step = build_config("tokenizer", films.tokenizer).frames_per_code
    assert (from_dict(VideoData, films.data).frames - 1) % step == 0
    loss = from_dict(PictureLossConfig, tomllib.loads(parts)["loss"])
    assert loss.perceptual and loss.adversarial and loss.balance


def test_training_goes_on_from_a_saved_tokenizer(root):
    first = run_recipe(Recipe.from_dict(RECIPE), root / "first", data_root=root, progress=False)
    recipe = RECIPE | {"tokenizer": {"start": str(first)}, "run": RECIPE["run"] | {"steps": 10}}
    second = run_recipe(Recipe.from_dict(recipe), root / "second", data_root=root, progress=False)
    before, after = (
        [json.loads(line)["loss"] for line in (root / name / "log.jsonl").read_text().splitlines()] for name in ("first", "second")
    )
    assert after[0] < (before[0] + before[-1]) / 2
    assert from_pretrained(second).config == from_pretrained(first).config
    assert from_pretrained(second).spec.fingerprint != from_pretrained(first).spec.fingerprint


def test_a_start_has_its_own_configuration(root):
    recipe = Recipe.from_dict(RECIPE | {"tokenizer": RECIPE["tokenizer"] | {"start": "image-fsq-f8"}})
    with pytest.raises(ConfigError, match="tokenizer.decoder_blocks: image-fsq-f8 has its own; give either 'start' or"):
        run_recipe(recipe, root / "run", data_root=root, progress=False)


def test_tokenizers_without_parts_to_train_are_refused(root, block_registered):
    recipe = Recipe.from_dict(RECIPE | {"tokenizer": {"type": "block", "block": 8}})
    with pytest.raises(ConfigError, match="tokenizer.type: 'block' has no quantizer and decoder"):
        run_recipe(recipe, root / "run", data_root=root, progress=False)


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ("data", "sizes", "data: unknown key 'sizes'; did you mean"),
        ("loss", "l3", "loss: unknown key 'l3'"),
        ("tokenizer", "width", "did you mean 'widths'"),
    ],
)
def test_unknown_keys_of_the_tasks_own_tables(root, table, key, message):
    recipe = Recipe.from_dict(RECIPE | {table: {**RECIPE.get(table, {}), key: 1}})
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe, root / "run", data_root=root, progress=False)
