import pytest
import torch

from mmtp.config import ConfigError
from mmtp.data.media import encode_png
from mmtp.hub import from_pretrained
from mmtp.train.recipe import Recipe, run_recipe

WORDS = "a blue circle beside the green triangle, over one yellow rectangle"


@pytest.fixture
def root(tmp_path):
    lines = []
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encode_png(torch.zeros(3, 4, 4)))
        lines.append(f'{{"image": "{i}.png", "caption": "{WORDS} {i}"}}\n')
    (tmp_path / "list.jsonl").write_text("".join(lines))
    return tmp_path


def recipe(size):
    return Recipe.from_dict(
        {
            "task": "text",
            "tokenizer": {"type": "text", "size": size},
            "data": {"sources": [{"source": "list.jsonl", "template": "draw {caption}"}]},
        }
    )


def test_a_recipe_becomes_a_vocabulary(root):
    tokenizer = from_pretrained(run_recipe(recipe(280), root / "run", data_root=root, progress=False))
    assert tokenizer.spec.codebook_sizes == (280,)
    assert len(tokenizer.encode_text(f"draw {WORDS}")) < len(WORDS) - 10


def test_too_few_texts_for_the_size(root):
    with pytest.raises(ConfigError, match=r"tokenizer\.size: the texts give \d+ entries, not 5000"):
        run_recipe(recipe(5000), root / "run", data_root=root, progress=False)


def test_a_size_without_room_for_the_bytes(root):
    with pytest.raises(ConfigError, match="size 100: the 256 bytes need room"):
        run_recipe(recipe(100), root / "run", data_root=root, progress=False)
