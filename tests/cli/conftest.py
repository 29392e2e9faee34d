"""A zoo that answers in moments: a block tokenizer and an untrained model under the names of the real ones, and few pictures."""

import shutil
from pathlib import Path

import pytest
import torch

from mmtp import hub


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
