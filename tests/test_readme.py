"""The Python of the README and of the pages under docs runs, as it stands, and their links lead somewhere.

Blocks marked ``py`` need a data set and are not run.
"""

import re
from pathlib import Path

import pytest

from mmtp.cli import VERBS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [pytest.param(p, id=p.name) for p in PAGES if _blocks(p)])
def test_python_runs_and_prints_what_its_comments_say(page, tmp_path, monkeypatch, capsys, block_registered):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in _blocks(page):
        exec(compile(block, page.name, "exec"), names)
        said = re.findall(r"^\s*print\(.*\)  # (.+)$", block, flags=re.MULTILINE)
        printed = capsys.readouterr().out.splitlines()
        if said:
            assert printed == said


@pytest.mark.parametrize("page", [pytest.param(p, id=p.name) for p in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_page_of_the_command_line_lists_every_verb():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `mmtp (\w+)` \|", text, flags=re.MULTILINE) == list(VERBS)
