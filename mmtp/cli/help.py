"""Help pages, made from signatures and docstrings alone, so that they cost milliseconds."""

import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

ROOT_TEXT = "Any medium to tokens, one model over all of them, several future tokens per step, and back to the medium, exactly."
ROOT_EXAMPLES = """\
mmtp demo                                             the whole path, on real pictures
mmtp tokenize photos/ --tokenizer image-fsq-f8 --out tokens/
mmtp train tokenizers/image-fsq-f8/recipe.toml --run-dir runs/mine
mmtp zoo                                              what is trained already"""
SECTIONS = ("Args", "Examples", "Returns", "Raises", "Note", "Notes", "Yields")


@dataclass(frozen=True)
class Entry:
    """One argument or option of a verb, as its help page shows it."""

    names: str
    text: str
    positional: bool
    required: bool


def root_help(verbs: dict[str, str]) -> str:
    """The page of ``mmtp --help``; ``verbs`` maps names to one line each."""
    options = {"--help, -h": "show this page, or a verb's", "--version": "show the version", "--debug": "show tracebacks of errors"}
    codes = "0 done, 1 a check failed, 2 an error you can mend, 3 a fault of mmtp, 130 interrupted"
    return "\n".join(
        [
            "Usage: mmtp VERB [OPTIONS]",
            "",
            _fill(ROOT_TEXT),
            "",
            _block("Verbs:", verbs.items()),
            _block("Options:", options.items()),
            "Examples:",
            textwrap.indent(ROOT_EXAMPLES, "  "),
            "",
            _fill(f"Exit codes: {codes}."),
            "",
        ]
    )


def verb_help(name: str, function: Callable[..., Any]) -> str:
    """The page of ``mmtp VERB --help``."""
    sections = docstring_sections(inspect.getdoc(function) or "")
    described = dict(_arguments(sections.get("Args", "")))
    entries = [_entry(p, described) for p in inspect.signature(function).parameters.values()]
    usage = ["mmtp", name, *(e.names.split(" / ")[0] for e in entries if e.required and not e.positional), "[OPTIONS]"]
    usage += [e.names if e.required else f"[{e.names}]" for e in entries if e.positional]
    parts = [f"Usage: {' '.join(usage)}", "", *(_fill(p) + "\n" for p in sections[""].split("\n\n"))]
    if positional := [(e.names, e.text) for e in entries if e.positional]:
        parts.append(_block("Arguments:", positional))
    options = [(e.names, e.text) for e in entries if not e.positional]
    parts.append(_block("Options:", [*options, ("--debug", "show the traceback of an error"), ("--help, -h", "show this page")]))
    if "Examples" in sections:
        parts += ["Examples:", textwrap.indent(sections["Examples"], "  "), ""]
    return "\n".join(parts)


def docstring_sections(doc: str) -> dict[str, str]:
    """A Google docstring by section; the text before the first one is under the empty name."""
    heads = re.compile(rf"^({'|'.join(SECTIONS)}):\s*$", re.MULTILINE)
    pieces = heads.split(doc)
    bodies = {"": pieces[0].strip()}
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        bodies[title] = textwrap.dedent(body.strip("\n")).rstrip()
    return bodies


def option_names(parameter: inspect.Parameter) -> list[str]:
    """What the command line calls an option; cyclopts derives the same names."""
    given = [n for m in typing.get_args(parameter.annotation)[1:] for n in _as_tuple(getattr(m, "name", None) or ())]
    flags = [n if n.startswith("-") else f"--{n}" for n in given] or [f"--{parameter.name.strip('_').replace('_', '-')}"]
    return [*flags, f"--no-{flags[0][2:]}"] if _bare(parameter.annotation) is bool else flags


def _entry(parameter: inspect.Parameter, described: dict[str, str]) -> Entry:
    kind, default = parameter.kind, parameter.default
    required = default is inspect.Parameter.empty and kind is not inspect.Parameter.VAR_POSITIONAL
    positional = kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL) or (
        kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and required
    )
    text = described.get(parameter.name, "")
    if required and not positional:
        text += " [required]"
    elif default not in (None, False, True, (), [], inspect.Parameter.empty, ""):
        text += f" [default: {_shown(default)}]"
    hint = _bare(parameter.annotation)
    many = kind is inspect.Parameter.VAR_POSITIONAL or typing.get_origin(hint) in (list, tuple)
    if positional:
        return Entry(parameter.name.upper().replace("_", "-") + ("..." if many else ""), text.strip(), True, required)
    names = option_names(parameter)
    if hint is bool:
        return Entry(names[1] if default is True else names[0], text.strip(), False, required)
    return Entry(f"{', '.join(names)} {_metavar(hint)}" + (" ..." if many else ""), text.strip(), False, required)


def _bare(annotation: Any) -> Any:
    """The type without ``Annotated`` and without ``| None``."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        arms = [a for a in typing.get_args(annotation) if a is not type(None)]
        annotation = arms[0] if len(arms) == 1 else annotation
    return annotation


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (list, tuple):
        return _metavar(_bare(typing.get_args(hint)[0]))
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return "PATH"
    return {int: "N", float: "X"}.get(hint, "TEXT")


def _shown(default: Any) -> str:
    return ", ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


def _arguments(body: str) -> list[tuple[str, str]]:
    pieces = re.split(r"^(\w+)(?: \([^)]*\))?:", body, flags=re.MULTILINE)
    return [(name, " ".join(text.replace("``", "").split())) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)]


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 120)


def _fill(paragraph: str) -> str:
    """Wraps running text; indented (verbatim) paragraphs stay as they are."""
    if paragraph.startswith(" "):
        return paragraph
    return textwrap.fill(" ".join(paragraph.replace("``", "").split()), _width(), break_on_hyphens=False)


def _block(title: str, rows: Any) -> str:
    rows = list(rows)
    column = min(max(len(names) for names, _ in rows), 32) + 4
    lines = [title]
    for names, text in rows:
        head = f"  {names}".ljust(column)
        wrapped = textwrap.wrap(text, max(_width() - column, 30), break_long_words=False, break_on_hyphens=False) or [""]
        if len(head) > column:
            lines.append(head.rstrip())
            head = " " * column
        lines.append((head + wrapped[0]).rstrip())
        lines += [" " * column + line for line in wrapped[1:]]
    return "\n".join([*lines, ""])
