"""Small real tokenizers and a folder of pictures, made once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmtp import hub
from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.text import TextTokenizer


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a picture tokenizer (untrained, 8 pixels a cell) and a text tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(7)
    config = ConvImageTokenizer.Config(patch=4, widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    hub.save_pretrained(ConvImageTokenizer(config).eval(), root / "img")
    words = ["what color is the shape?", "is there a circle?", "yes", "no", "red", "draw a red circle", "a blue triangle"]
    hub.save_pretrained(TextTokenizer.train(words * 4, 300), root / "txt")
    return {"image": root / "img", "text": root / "txt"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """24 pictures of two sizes with captions and questions, and five files that are none."""
    root = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for i in range(24):
        side = (16, 24)[i % 2]
        path = root / f"{'ab'[i % 2]}/{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, 16, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text("a red circle\n")
        questions = [["is there a circle?", "yes"], ["what color is the shape?", "red"], ["is there a circle?", "no"]]
        path.with_suffix(".json").write_text(json.dumps({"questions": questions[: 1 + i % 3]}))
    (root / "b/empty.png").write_bytes(b"")
    (root / "b/text.png").write_text("this is no picture")
    whole = (root / "a/00.png").read_bytes()
    (root / "b/cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "b/gone.png").symlink_to("nowhere.png")
    Image.fromarray(rng.integers(0, 256, (16, 8 * 70, 3), dtype=np.uint8)).save(root / "b/wide.png")
    (root / "b/wide.txt").write_text("a very wide picture")
    return root
