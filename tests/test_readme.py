"""The README's Python runs, as it stands, from top to bottom."""

import re

import pytest


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_python_of_the_readme_runs(request, tmp_path, monkeypatch):
    blocks = _blocks((request.config.rootpath / "README.md").read_text(encoding="utf-8"))
    if not blocks:
        pytest.skip("the README holds no Python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_links_of_the_readme_lead_somewhere(request):
    root = request.config.rootpath
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
