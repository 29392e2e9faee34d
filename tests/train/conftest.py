"""Shards for tests that train models."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtp.data.encode import TokenizeConfig
from mmtp.data.job import tokenize
from mmtp.hub import save_pretrained
from mmtp.models.language import LanguageConfig
from mmtp.models.teachers import TeacherConfig
from mmtp.registry import REGISTRY
from mmtp.testing.fakes import BlockTokenizer
from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.text import TextTokenizer
from mmtp.train.teach import teach
from tests.models.tiny_language import TEXTS, save_tiny_teacher


def register_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(REGISTRY, "_families", {family: dict(entries) for family, entries in REGISTRY._families.items()})
    REGISTRY.register("tokenizer", "block", "mmtp.testing.fakes:BlockTokenizer")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures as shards: coloured halves, so that there is something to learn."""
    root = tmp_path_factory.mktemp("data")
    (root / "pictures").mkdir()
    for i in range(40):
        picture = Image.new("RGB", (24, 16), ((i % 4) * 80, 255, 0))
        picture.paste((0, 0, 255), (0, 0, 12, 16))
        picture.save(root / "pictures" / f"{i:02}.png")
    with pytest.MonkeyPatch.context() as patch:
        register_block(patch)
        tokenize(root / "pictures", root / "shards", tokenizer=BlockTokenizer(BlockTokenizer.Config()), config=TokenizeConfig(max_dim=8))
    return root


@pytest.fixture(scope="session")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about pictures as shards, and the folders of two teachers: ``eye`` sees, ``tongue`` speaks; nobody has asked them yet."""
    root = tmp_path_factory.mktemp("school")
    (root / "pictures").mkdir()
    for i in range(24):
        path = root / "pictures" / f"{i:02}.png"
        Image.new("RGB", (16, 8 + 8 * (i % 2)), ((i % 6) * 50, 255 - (i % 6) * 50, 0)).save(path)
        questions = [["what color is the shape?", ("red", "blue")[i % 2]], ["is there a circle?", "no"]]
        path.with_suffix(".json").write_text(json.dumps({"caption": "a red circle", "questions": questions}))
    torch.manual_seed(2)
    for name, widths in (("cells", (8, 8)), ("eye", (8,))):
        blocks = (1,) * len(widths)
        config = ConvImageTokenizer.Config(patch=4, widths=widths, encoder_blocks=blocks, decoder_blocks=blocks)
        save_pretrained(ConvImageTokenizer(config).eval(), root / name)
    save_pretrained(TextTokenizer.train(TEXTS * 4, 300), root / "words")
    save_tiny_teacher(root / "tongue")
    tasks = TokenizeConfig(tasks=("vqa", "draw"), max_dim=8, shard_inputs=10)
    tokenize(root / "pictures", root / "shards", tokenizer=root / "cells", text=root / "words", config=tasks)
    return root


@pytest.fixture(scope="session")
def taught(school: Path) -> Path:
    """The same, when they have been asked."""
    for teacher in teachers(school):
        teach(school / "shards", teacher, tokenizers=[school / "cells", school / "words"])
    return school


def teachers(school: Path, top: int = 8) -> tuple[TeacherConfig, LanguageConfig]:
    """One that sees, and one that speaks."""
    return TeacherConfig(network=f"tokenizer:{school}/eye", size=16), LanguageConfig(network=f"transformers:{school}/tongue", top=top)
