import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from mmtp.config import build_config
from mmtp.data.media import encode_png
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.train.recipe import Recipe, run_recipe
from mmtp.train.semantic_trainer import feature_colours
from mmtp.train.views import PictureViews

CONV = {
    "type": "image-conv",
    "patch": 4,
    "widths": [8],
    "encoder_blocks": [1],
    "decoder_blocks": [1],
    "quantizer": {"type": "fsq", "levels": [5, 5]},
}
RECIPE = {
    "task": "tokenizer",
    "tokenizer": {
        "type": "timm-vit",
        "model": "vit_tiny_patch16_224",
        "options": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16, "reg_tokens": 1},
    },
    "data": {"size": 16, "sources": [{"source": "pictures", "flips": "all"}]},
    "loss": {
        "distill": {
            "statistics": 16,
            "teachers": [
                {"network": "timm:test_resnet", "weights": "weights.safetensors", "stage": 1},
                {"network": "tokenizer:conv"},
            ],
        }
    },
    "optim": {"lr": 3e-3, "warmup": 5, "ema": 0.9},
    "run": {"steps": 60, "batch": 8, "log_every": 10, "preview_every": 50},
}
CONTRAST = {"width": 32, "depth": 1, "dim": 16}


@pytest.fixture
def root(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        picture = torch.full((3, 16, 16), 0.9)
        picture[i % 3, 2 + i // 3 : 10, 4:12] = 0.1
        (tmp_path / "pictures" / f"{i}.png").write_bytes(encode_png(picture))
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / "weights.safetensors")
    save_pretrained(build_config("tokenizer", CONV).build(), tmp_path / "conv")
    return tmp_path


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def changed(**distill):
    return RECIPE | {"loss": {"distill": RECIPE["loss"]["distill"] | distill}}


@pytest.mark.parametrize("views", [0, 2])
def test_a_student_learns_from_both_teachers(root, views):
    result = run_recipe(Recipe.from_dict(changed(views=views)), root / "run", data_root=root, progress=False)
    found = records(root / "run")
    for teacher in ("test_resnet", "conv"):
        assert found[-1][f"{teacher}.cosine"] > found[0][f"{teacher}.cosine"] + 0.2
        assert found[-1][f"{teacher}.masked_cosine"] > found[0][f"{teacher}.masked_cosine"] + 0.1
        assert found[-1][teacher] < found[0][teacher]
    assert (root / "run/previews/step-000050.png").is_file()
    tokenizer = from_pretrained(result)
    latents = tokenizer.encode([torch.rand(3, 16, 16), torch.rand(3, 20, 9)])
    assert latents.values.shape == (2, 16, 24) and latents.lengths.tolist() == [16, 15]


@pytest.mark.parametrize(("views", "contrast"), [(0, False), (2, True)])
def test_stopped_and_continued_equals_uninterrupted(root, monkeypatch, views, contrast):
    recipe = changed(views=views) | {"run": {"steps": 8, "batch": 4, "log_every": 1, "checkpoint_every": 3}}
    if contrast:
        recipe["loss"]["contrast"] = CONTRAST
        for i in range(12):
            (root / "pictures" / f"{i}.txt").write_text(f"number {i}")
    recipe = Recipe.from_dict(recipe)
    run_recipe(recipe, root / "whole", data_root=root, progress=False)
    with monkeypatch.context() as patch:
        draw = PictureViews.draw

        def stop(self, step, count):
            if step == 5 and count == 4:
                raise KeyboardInterrupt
            return draw(self, step, count)

        patch.setattr(PictureViews, "draw", stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, root / "stopped", data_root=root, progress=False)
    run_recipe(recipe, root / "stopped", data_root=root, progress=False)
    whole, stopped = (
        [{k: v for k, v in r.items() if "_per_second" not in k} for r in records(root / name)] for name in ("whole", "stopped")
    )
    assert whole == stopped and len(whole) == 8
    states = [torch.load(root / name / "checkpoints/step-00000008.pt", weights_only=True) for name in ("whole", "stopped")]
    for part in ("module", "average"):
        assert all(torch.equal(states[0][part][name], value) for name, value in states[1][part].items())
    parts = {"student", "distiller", "contrast"} if contrast else {"student", "distiller"}
    assert {name.partition(".")[0] for name in states[0]["module"]} == parts


def test_colours_are_principal_components():
    values = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 3, 0.1, 0.1, 0.1, 0.1, 0.1])
    colours = feature_colours(values, (3, 4), 24)
    assert colours.shape == (2, 3, 24, 24) and 0 <= colours.min() < 0.01 and 0.99 < colours.max() <= 1
    first = colours[:, 0, ::8, ::6].flatten()
    assert torch.corrcoef(torch.stack([first, values[..., 0].flatten()]))[0, 1].abs() > 0.95
    assert torch.equal(colours[..., 0, 0], colours[..., 7, 5])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"loss": {}}, "loss: a vision transformer learns"),
        ({"loss": {"distil": {}}}, "loss: unknown key 'distil'; did you mean 'distill'"),
        ({"data": RECIPE["data"] | {"size": 18}}, "data.size: 18 is no multiple of 4"),
        ({"data": RECIPE["data"] | {"seconds": 1.0}}, "data: unknown key 'seconds'"),
        (changed(teachers=[{"network": "tokenizer:none"}]), "none: no such path"),
        (changed(teachers=[{"network": "timm:test_resnet", "weights": "gone"}]), "loss.distill.teachers: timm's 'test_resnet' cannot"),
    ],
)
def test_recipes_that_do_not_fit_are_one_line(root, tables, message):
    with pytest.raises(ValueError, match=message) as error:
        run_recipe(Recipe.from_dict(RECIPE | tables), root / "run", data_root=root, progress=False)
    assert "\n" not in str(error.value)


def test_a_student_learns_from_captions(root):
    lines = [json.dumps({"path": f"pictures/{i}.png", "caption": f"colour {i % 3}, height {i // 3}"}) for i in range(12)]
    (root / "captions.jsonl").write_text("\n".join(lines) + "\n")
    tables = {
        "data": {"size": 16, "sources": [{"source": "captions.jsonl"}]},
        "loss": {"contrast": CONTRAST | {"loss": "clip"}},
        "run": RECIPE["run"] | {"steps": 100},
    }
    result = run_recipe(Recipe.from_dict(RECIPE | tables), root / "run", data_root=root, progress=False)
    found = records(root / "run")
    assert found[-1]["contrast"] < 0.6 * found[0]["contrast"]
    assert found[-1]["contrast.accuracy"] > 0.5
    assert (root / "run/previews/step-000050.png").is_file()
    tokenizer, towers = from_pretrained(result), from_pretrained(result / "towers")
    assert towers.embed_features(tokenizer.encode([torch.rand(3, 16, 16)]).values).shape == (1, 16)


def test_captions_must_be_there(root):
    recipe = RECIPE | {"loss": {"contrast": CONTRAST}}
    with pytest.raises(ValueError, match=r"loss\.contrast: no picture of the sources has a caption"):
        run_recipe(Recipe.from_dict(recipe), root / "run", data_root=root, progress=False)
