from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmtp.decode.rows import Row
from mmtp.eval.decoding import Prompt
from mmtp.stream.vocab import Special
from tests.models.common import LAYOUT, model

DRAW = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT, Special.BOI]
WORDS = (int(Special.END), int(Special.BOI))


@pytest.fixture
def check(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Runs the script over a tiny model; gives its status."""
    net = model(depth=2).eval()
    prompts = [Prompt("draw", [*DRAW, LAYOUT.dim(2), LAYOUT.dim(2 + i % 3)], 6, (int(Special.EOI),)) for i in range(2)]
    prompts += [Prompt("say", [Special.BOS, Special.USER, 40 + i, Special.END, Special.ASSISTANT, 41], 3, WORDS) for i in range(2)]
    monkeypatch.setattr(script, "load", lambda given: (net, prompts))
    threads = torch.get_num_threads()
    yield lambda *argv: script.main(["tiny", "--drafts", "head", "jacobi", "--batch", "1", "2", *map(str, argv)])
    torch.set_num_threads(threads)


def test_every_way_is_compared_at_every_batch_and_found_once(check, script, tmp_path: Path, monkeypatch, capsys) -> None:
    journal = tmp_path / "found.jsonl"
    assert check("--temperature", 1, "--journal", journal) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    ways = [("none", "1"), ("head", "1"), ("jacobi", "1"), ("head", "2"), ("jacobi", "2")]
    assert [(row[0], row[2], row[4], row[5]) for row in cells] == [
        (medium, way, guidance, batch) for medium, guidance in (("image", "off"), ("image", "3"), ("text", "off")) for way, batch in ways
    ]
    assert all(row[6:8] == ["2", "2"] for row in cells)

    # What is in the journal is not decoded again, and half a line at its end does no harm.
    text = journal.read_text()
    journal.write_text(text[:-20])
    decoded = []
    decode = script.Check.decode
    monkeypatch.setattr(script.Check, "decode", lambda *args: decoded.append(args[2:]) or decode(*args))
    assert check("--temperature", 1, "--journal", journal) == 0
    again = capsys.readouterr().out.splitlines()
    assert decoded == [("jacobi", 2)] and again[:-1] == lines[:-1]
    assert check("--temperature", 1, "--journal", journal, "--seed", 7, "--guidance", 1) == 0
    assert len(decoded) == 1 + 2 * 6  # another seed is another matter


def test_compiled_kernels_are_another_matter(check, script, tmp_path: Path, monkeypatch, capsys) -> None:
    compiled = []
    engine = script.Engine
    monkeypatch.setattr(script, "Engine", lambda *args, **how: compiled.append(how["compile"]) or engine(*args, **how))
    once = ["--temperature", 0, "--guidance", 1, "--journal", tmp_path / "found.jsonl"]
    assert check(*once) == 0
    plain = len(compiled)
    assert check(*once, "--compile") == 0
    assert compiled == [False] * plain + [True] * plain


def test_a_difference_is_told_with_prompt_and_offset(check, monkeypatch, capsys) -> None:
    accept = Row.accept

    def trusting(row: Row, truths: list[int]) -> int:
        """Keeps drafts whatever the model says."""
        return accept(row, [*row.drafts, truths[-1]])

    monkeypatch.setattr(Row, "accept", trusting)
    assert check("--temperature", 1, "--guidance", 1) == 1
    shown = capsys.readouterr()
    assert "draw, drafts head, temperature 1, guidance 1, batch 1: prompt 0, offset 1" in shown.err and "plainly" in shown.err
