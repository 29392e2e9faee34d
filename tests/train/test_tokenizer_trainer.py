import json

import pytest
import torch

from mmtp.config import ConfigError
from mmtp.data.media import encode_png
from mmtp.hub import from_pretrained
from mmtp.train.recipe import Recipe, run_recipe

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


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        picture = torch.full((3, 16, 16), 0.9)
        picture[i % 3, 2:10, 4:12] = 0.1
        (tmp_path / "pictures" / f"{i}.png").write_bytes(encode_png(picture))
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
