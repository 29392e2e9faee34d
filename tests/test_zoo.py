"""What the zoo promises, held against every entry."""

from pathlib import Path

import pytest

from mmtp.hub import ZOO_FOLDERS, iter_zoo, zoo_root
from mmtp.testing import check_zoo_entry

ENTRIES = list(iter_zoo())


@pytest.mark.parametrize("family", ZOO_FOLDERS)
def test_the_zoo_holds_data_only(family):
    assert list(zoo_root(family).rglob("*.py")) == []


@pytest.mark.parametrize("folder", [pytest.param(folder, id=folder.name) for _, folder in ENTRIES])
def test_entry_loads_validates_and_reproduces(folder: Path):
    check_zoo_entry(folder)


@pytest.mark.parametrize("folder", [pytest.param(folder, id=folder.name) for _, folder in ENTRIES])
def test_readme_lists_the_entry(request, folder: Path):
    assert f"`{folder.name}`" in (request.config.rootpath / "README.md").read_text(encoding="utf-8")
