"""What the verbs are tried on: small real tokenizers, a folder of pictures, a zoo that answers in moments."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmtp import hub
from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.text import TextTokenizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of an untrained picture tokenizer and a small text tokenizer."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(7)
    config = ConvImageTokenizer.Config(patch=4, widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    hub.save_pretrained(ConvImageTokenizer(config).eval(), root / "img")
    hub.save_pretrained(TextTokenizer.train(["draw a red circle", "a blue triangle"] * 4, 280), root / "txt")
    return {"image": str(root / "img"), "text": str(root / "txt")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five captioned pictures and an empty file."""
    root = tmp_path / "photos"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 24, 3), dtype=np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text("a red circle")
    (root / "empty.jpg").touch()
    return root


@pytest.fixture
def little_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_registered: None) -> Path:
    """The zoo's root holds image-fsq-f8 (flat blocks, 4 x 4 cells), text-bpe-4k (the real one) and vqa-s (knows nothing)."""
    easy_vqa = pytest.importorskip("easy_vqa")
    from mmtp.data.sources import easy_vqa as source
    from mmtp.models.presets import preset
    from mmtp.stream.vocab import VocabLayout
    from mmtp.testing.fakes import BlockTokenizer

    root = tmp_path / "zoo"
    shutil.copytree(hub.zoo_root("tokenizer") / "text-bpe-4k", root / "tokenizers" / "text-bpe-4k")
    hub.save_pretrained(BlockTokenizer.Config(block=16, levels=3).build(), root / "tokenizers" / "image-fsq-f8")
    monkeypatch.setattr(hub, "zoo_root", lambda family: root / hub.ZOO_FOLDERS[family])
    tokenizers = {name: hub.from_pretrained(name) for name in ("text-bpe-4k", "image-fsq-f8")}
    torch.manual_seed(0)
    hub.save_pretrained(preset("tiny", VocabLayout.of(tokenizers)).build(), root / "models" / "vqa-s")

    paths = {split: getattr(easy_vqa, f"get_{split}_image_paths")() for split in ("train", "test")}
    monkeypatch.setattr(source, "_pictures", lambda split: {i: Path(paths[split][i]) for i in range(5)})
    # Worker processes would see neither this zoo nor these few pictures.
    monkeypatch.setattr("mmtp.data.engines.local.cores", lambda: 1)
    return root


@pytest.fixture
def recordings(tmp_path: Path) -> dict[str, str]:
    """A folder of two recordings with texts, one of silence and one that is none; and an untrained tokenizer of sound."""
    import soundfile

    from mmtp.tokenizers.audio.frame import FrameAudioTokenizer
    from mmtp.tokenizers.quantizers import FSQ

    torch.manual_seed(1)
    config = FrameAudioTokenizer.Config(
        sample_rate=8000, window=320, hop=160, width=8, encoder_blocks=1, decoder_blocks=1, quantizer=FSQ.Config(levels=(5, 5))
    )
    hub.save_pretrained(config.build().eval(), tmp_path / "sound")
    folder = tmp_path / "recordings"
    folder.mkdir()
    time = np.arange(16000) / 16000
    for i, sound in enumerate((np.sin(1500 * time**2), 0.3 * np.sin(2000 * time) * np.sin(9 * time), np.zeros(16000))):
        soundfile.write(folder / f"{i}.wav", 0.5 * sound, 16000)
        (folder / f"{i}.txt").write_text("one two")
    (folder / "empty.wav").touch()
    soundfile.write(folder / "none.wav", np.zeros(0), 16000)
    return {"tokenizer": str(tmp_path / "sound"), "folder": str(folder)}
