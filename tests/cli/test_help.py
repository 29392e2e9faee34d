import inspect
import shlex
from pathlib import Path
from typing import Literal

import pytest

from mmtp import cli
from mmtp.cli.help import docstring_sections, option_names, verb_help


def probe(
    source: Path,
    *more: str,
    out: Path,
    num_rows: int = 3,
    rate: float | None = None,
    kind: Literal["a", "b"] = "a",
    names: list[str] | None = None,
    sizes: tuple[int, ...] = (1, 2),
    fast: bool = False,
    slow: bool = True,
) -> int:
    """Do a thing.

    Long words about ``it``,
    over two lines.

    Args:
        source: where it comes from.
        more: and more.
        out: where it goes,
            on and on.
        num_rows: how many.
        kind: which.

    Returns:
        nothing of interest.

    Examples:
        mmtp probe a --out b
        mmtp probe c --out d
    """
    return 0


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    return verb_help("probe", probe)


def test_a_page_says_what_the_function_says(page):
    assert page == (
        "Usage: mmtp probe --out PATH [OPTIONS] SOURCE [MORE...]\n"
        "\n"
        "Do a thing.\n"
        "\n"
        "Long words about it, over two lines.\n"
        "\n"
        "Arguments:\n"
        "  SOURCE   where it comes from.\n"
        "  MORE...  and more.\n"
        "\n"
        "Options:\n"
        "  --out PATH        where it goes, on and on. [required]\n"
        "  --num-rows N      how many. [default: 3]\n"
        "  --rate X\n"
        "  --kind a|b        which. [default: a]\n"
        "  --names TEXT ...\n"
        "  --sizes N ...     [default: 1, 2]\n"
        "  --fast\n"
        "  --no-slow\n"
        "  --debug           show the traceback of an error\n"
        "  --help, -h        show this page\n"
        "\n"
        "Examples:\n"
        "  mmtp probe a --out b\n"
        "  mmtp probe c --out d\n"
    )


def test_long_texts_wrap_under_their_column(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    lines = verb_help("train", cli.load_verb("train")).splitlines()
    assert max(map(len, lines)) <= 90  # only examples and single words may be longer than the terminal
    start = next(i for i, line in enumerate(lines) if line.startswith("  --set TEXT"))
    assert lines[start + 1].startswith(" " * 15)


def test_sections_of_a_docstring():
    assert docstring_sections("One.\n\nTwo.\n\nArgs:\n    a: b.\n\nExamples:\n    x\n      y\n") == {
        "": "One.\n\nTwo.",
        "Args": "a: b.",
        "Examples": "x\n  y",
    }


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_names_the_options_that_the_parser_takes(name):
    function = cli.load_verb(name)
    app = cli.parser(name)[name]
    taken = {n for argument in app.assemble_argument_collection() for n in argument.names if n.startswith("--")}
    shown = {
        n for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY for n in option_names(p)
    }
    assert shown == taken


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_example_is_a_command_that_can_be_read(name):
    parser = cli.parser(name)
    for line in docstring_sections(inspect.getdoc(cli.load_verb(name)) or "")["Examples"].splitlines():
        program, *argv = shlex.split(line)
        argv = ["3" if word.startswith("$") else word for word in argv]
        assert (program, argv[0]) == ("mmtp", name)
        parser.parse_args(argv)


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_option_of_a_verb_is_explained(name):
    function = cli.load_verb(name)
    described = docstring_sections(inspect.getdoc(function) or "").get("Args", "")
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in described, f"mmtp {name}: {parameter} is not explained"
