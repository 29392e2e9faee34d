"""Shards for tests that train models."""

from pathlib import Path

import pytest
from PIL import Image

from mmtp.data.encode import TokenizeConfig
from mmtp.data.job import tokenize
from mmtp.registry import REGISTRY
from mmtp.testing.fakes import BlockTokenizer


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
