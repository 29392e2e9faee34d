"""The card of a zoo entry: ``README.md`` with a fixed set of sections, so that people and ``mmtp zoo`` find the same things."""

import re
from dataclasses import dataclass
from pathlib import Path

from mmtp.types import MmtpError

SECTIONS = ("Data", "Licence", "Measured", "Reproduce")


class CardError(MmtpError):
    """A card that lacks a section, a measured figure, or the command that reproduces the entry."""


@dataclass(frozen=True)
class Card:
    """A card, read.

    Attributes:
        name: its title, which is the entry's name.
        what: the first sentence under it.
        sections: text by second-level heading.
        columns: headings of the table under ``Measured``.
        measured: its rows.
    """

    name: str
    what: str
    sections: dict[str, str]
    columns: tuple[str, ...]
    measured: tuple[tuple[str, ...], ...]

    @property
    def headline(self) -> str:
        """The first measured row in words, without the command that measures it."""
        first, *rest = self.measured[0]
        cells = [(c, v) for c, v in zip(self.columns[1:], rest, strict=False) if c != "command" and v]
        return f"{first}: " + ", ".join(value if column == "value" else f"{column} {value}" for column, value in cells)


def read_card(path: Path) -> Card:
    """Reads and checks a card.

    Raises:
        CardError: names the file and what it lacks.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CardError(f"{path}: cannot be read ({error.strerror})") from error
    if text.startswith("---\n"):  # front matter, as the Hub writes it
        text = text.partition("\n---\n")[2]
    head, *rest = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    title = re.search(r"^# (.+)$", head, flags=re.MULTILINE)
    if title is None:
        raise CardError(f"{path}: has no title '# NAME'")
    opening = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", head[title.end() :]).strip().split("\n\n")[0]
    what = re.split(r"(?<=[.!?])\s+(?=[A-Z])", opening, maxsplit=1)[0].replace("\n", " ")
    sections = {name.strip(): body.strip() for name, body in zip(rest[::2], rest[1::2], strict=True)}
    if not what:
        raise CardError(f"{path}: says nothing under its title; say in a sentence what it is")
    for name in SECTIONS:
        if not sections.get(name):
            raise CardError(f"{path}: has no section '## {name}'")
    columns, *measured = table_rows(sections["Measured"]) or [()]
    if not measured:
        raise CardError(f"{path}: '## Measured' holds no table of figures")
    if "mmtp " not in sections["Reproduce"]:
        raise CardError(f"{path}: '## Reproduce' holds no mmtp command")
    return Card(title[1].strip(), what, sections, columns, tuple(measured))


def table_rows(markdown: str) -> list[tuple[str, ...]]:
    """The first Markdown table: its headings, then its rows."""
    rows = []
    for line in markdown.splitlines():
        if line.startswith("|"):
            rows.append(tuple(cell.strip() for cell in line.strip().strip("|").split("|")))
        elif rows:
            break
    return rows[:1] + rows[2:]
