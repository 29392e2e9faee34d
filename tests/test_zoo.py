"""What the zoo promises, held against every entry."""

from pathlib import Path

import pytest
import torch

from mmtp.hub import ZOO_FOLDERS, from_pretrained, iter_zoo, zoo_root
from mmtp.testing import check_tokenizer, check_zoo_entry
from mmtp.testing.voice import voice
from mmtp.types import Modality

ENTRIES = list(iter_zoo())


@pytest.mark.parametrize("family", ZOO_FOLDERS)
def test_the_zoo_holds_data_only(family):
    assert list(zoo_root(family).rglob("*.py")) == []


@pytest.mark.parametrize("folder", [pytest.param(folder, id=folder.name) for _, folder in ENTRIES])
def test_entry_loads_validates_and_reproduces(folder: Path):
    check_zoo_entry(folder)


@pytest.mark.parametrize("folder", [pytest.param(folder, id=folder.name) for family, folder in ENTRIES if family == "tokenizer"])
def test_tokenizer_keeps_its_promises(folder: Path):
    tokenizer = from_pretrained(folder)
    fixed = getattr(tokenizer.config, "size", None)
    media = {
        Modality.TEXT: ["draw a blue circle", "", "Ünïcode 漢字 🙂\x00"],
        Modality.IMAGE: [torch.rand(3, *(fixed or (64, 64))), torch.rand(3, *(fixed or (9, 37)))],
        Modality.AUDIO: [voice(0.5), voice(0.11, seed=1), torch.zeros(1, 1)],
    }
    check_tokenizer(tokenizer, media[tokenizer.spec.modality])


@pytest.mark.parametrize("folder", [pytest.param(folder, id=folder.name) for _, folder in ENTRIES])
def test_readme_lists_the_entry(request, folder: Path):
    assert f"`{folder.name}`" in (request.config.rootpath / "README.md").read_text(encoding="utf-8")
