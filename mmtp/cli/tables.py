"""What verbs print with: progress bars on stderr, tables on stdout, numbers for people."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Step = Callable[..., None]
"""Called with what is done, what there is in all, and a remark."""


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Step]:
    """A bar with rate and time left on stderr; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TextColumn("left"))
    console = Console(stderr=True)
    bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[remark]}"), console=console, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task(title, total=None, remark="")

        def step(done: int, total: int, remark: str = "") -> None:
            bar.update(task, completed=done, total=total, remark=remark)

        yield step


def table(title: str, *columns: str) -> "Table":
    """An empty table."""
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


def facts(title: str, values: Mapping[str, Any]) -> "Table":
    """Names and values as a table of two columns."""
    out = table(title, "", "")
    out.show_header = False
    for name, value in values.items():
        out.add_row(name, str(value))
    return out


def show(*renderables: Any) -> None:
    """Prints to stdout. In a pipe there is no width to keep to: a table broken at 80 columns is of no use to grep."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    for renderable in renderables:
        console.print(renderable)
        console.print()


def count(number: float | int) -> str:
    """A number in three digits: 12.3k, 4.56M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def reasons(counts: Mapping[str, int]) -> str:
    """Quarantine by reason, in brackets; empty where there is none."""
    return f" ({', '.join(f'{reason} {number:,}' for reason, number in counts.items())})" if counts else ""
