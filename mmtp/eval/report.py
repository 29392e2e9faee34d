"""Reports: one self-contained HTML page from a list of sections, in light and dark.

Nothing is fetched when the page is opened: style, pictures (PNG), sounds (FLAC) and plots (SVG) are in the file. Plots take the colours of
their text and grid from the page, so that one file reads well on both backgrounds.
"""

import base64
import hashlib
import html
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.hub import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MplFigure
    from rich.table import Table as RichTable

Cell = str | int | float | None
Numbers = Sequence[float | int]

# Stand-ins in matplotlib's SVG for colours that the page decides.
_INK, _GRID = "#010203", "#040506"
SERIES_COLOURS = ("#2f7ed8", "#e0662f", "#2fa36b", "#b04fc4", "#c79a1b", "#7a8794")


@dataclass(frozen=True)
class Heading:
    """A title inside the page; level 2 opens a part, level 3 a passage."""

    text: str
    level: int = 2

    def html(self) -> str:
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Text:
    """A paragraph; every newline starts another."""

    text: str

    def html(self) -> str:
        return "".join(f"<p>{html.escape(line)}</p>" for line in self.text.splitlines() if line.strip())


@dataclass(frozen=True)
class Table:
    """Rows under named columns; numbers stand to the right. Floats are shown as they should be read: format them as strings.

    Attributes:
        columns: names.
        rows: as many cells as columns; None is shown as a dash.
        caption: what the table says.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.columns), (self.columns, row)

    def html(self) -> str:
        numeric = self._numeric()
        kinds = [' class="n"' if n else "" for n in numeric]
        head = "".join(f"<th{k}>{html.escape(c)}</th>" for k, c in zip(kinds, self.columns, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{k}>{html.escape(_shown(c))}</td>" for k, c in zip(kinds, row, strict=True)) + "</tr>"
            for row in self.rows
        )
        return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{_caption(self.caption)}"

    def rich(self) -> "RichTable":
        """The same table for a terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text as RichText

        table = RichTable(title=self.caption or None, title_justify="left", box=box.SIMPLE_HEAD)
        for column, numeric in zip(self.columns, self._numeric(), strict=True):
            table.add_column(RichText(column), justify="right" if numeric else "left")
        for row in self.rows:
            table.add_row(*(RichText(_shown(cell)) for cell in row))
        return table

    def _numeric(self) -> list[bool]:
        return [bool(self.rows) and all(_is_number(row[i]) for row in self.rows) for i in range(len(self.columns))]


@dataclass(frozen=True)
class Figure:
    """A plot, as SVG; made by :func:`lines` and :func:`bars` or any matplotlib figure through :func:`figure`."""

    svg: str
    caption: str = ""

    def html(self) -> str:
        return f"<figure>{self.svg}{_caption(self.caption)}</figure>"


@dataclass(frozen=True)
class Pictures:
    """Pictures in a grid, each with a line below.

    Attributes:
        images: RGB in [0, 1], ``[3, h, w]``; sizes may differ.
        labels: a line for each, or none at all.
        caption: of the whole grid.
        scale: screen pixels per pixel.
        good: per picture, whether it is right; marks the frame. None marks nothing.
    """

    images: Sequence[Float[Tensor, "3 _ _"]]
    labels: Sequence[str] = ()
    caption: str = ""
    scale: float = 1.5
    good: Sequence[bool | None] = ()

    def html(self) -> str:
        cells = []
        for i, image in enumerate(self.images):
            label = self.labels[i] if self.labels else ""
            good = self.good[i] if self.good else None
            mark = "" if good is None else (" class=good" if good else " class=bad")
            width = round(image.shape[2] * self.scale)
            below = f"<figcaption>{html.escape(label)}</figcaption>" if label else ""
            cells.append(
                f'<figure{mark} style="max-width:{max(width, 72)}px"><img width={width} src="{png_uri(image)}" '
                f'alt="{html.escape(label or "picture", quote=True)}">{below}</figure>'
            )
        return f"<div class=pictures>{''.join(cells)}</div>{_caption(self.caption)}"


@dataclass(frozen=True)
class Sounds:
    """Players in a table: every row has a sound under each column.

    Attributes:
        columns: what stands in them ("original", "reconstruction").
        rows: what a row is about, and as many sounds ``[1, t]`` in [-1, 1] as columns.
        sample_rate: of all sounds.
        caption: of the whole table.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Float[Tensor, "1 _"]]]]
    sample_rate: int
    caption: str = ""

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in ("", *self.columns))
        body = []
        for label, sounds in self.rows:
            assert len(sounds) == len(self.columns), (self.columns, len(sounds))
            players = (f'<td><audio controls src="{flac_uri(sound, self.sample_rate)}"></audio></td>' for sound in sounds)
            body.append(f"<tr><td>{html.escape(label)}</td>{''.join(players)}</tr>")
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        return f"<div class=scroll>{table}</div>{_caption(self.caption)}"


@dataclass(frozen=True)
class Tiles:
    """The few numbers that matter most, large. Each is (value, what it is, what to compare it with)."""

    tiles: Sequence[tuple[str, str, str]] = field(default_factory=tuple)

    def html(self) -> str:
        cells = (
            f"<div class=tile><b>{html.escape(value)}</b><span>{html.escape(label)}</span><small>{html.escape(note)}</small></div>"
            for value, label, note in self.tiles
        )
        return f"<div class=tiles>{''.join(cells)}</div>"


Section = Heading | Text | Table | Figure | Pictures | Sounds | Tiles


def render(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """The page as a string. Everything that is text is escaped."""
    contents = [s for s in sections if isinstance(s, Heading) and s.level == 2]
    links = "".join(f'<a href="#part-{i}">{html.escape(s.text)}</a>' for i, s in enumerate(contents))
    body = []
    for section in sections:
        part = section.html()
        if isinstance(section, Heading) and section.level == 2:
            part = f'<h2 id="part-{contents.index(section)}">' + part.removeprefix("<h2>")
        body.append(part)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_style()}</style></head><body><main><header><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(subtitle)}</p><nav>{links}</nav></header>{''.join(body)}</main></body></html>\n"
    )


def write_report(path: Path, title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Writes the page whole or not at all; returns its absolute path."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(title, sections, subtitle))
    return path


def _style() -> str:
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def png_uri(image: Float[Tensor, "3 h w"]) -> str:
    """A picture in [0, 1] as a ``data:`` address."""
    from PIL import Image

    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def flac_uri(sound: Float[Tensor, "1 t"], sample_rate: int) -> str:
    """A sound in [-1, 1] as a ``data:`` address, in 16 bits."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, sound[0].detach().float().cpu().clamp(-1, 1).numpy(), sample_rate, "PCM_16", format="FLAC")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()


def lines(
    series: Mapping[str, tuple[Numbers, Numbers]],
    x_label: str,
    y_label: str,
    caption: str = "",
    log_x: bool = False,
    log_y: bool = False,
    dots: Collection[str] = (),
) -> Figure:
    """Curves: name -> (x, y). A curve of one point is shown as a dot; ``dots`` names others whose points are marked."""
    plot = _figure()
    axes = plot.add_subplot()
    for (name, (x, y)), colour in zip(series.items(), _cycled(len(series)), strict=True):
        axes.plot(list(x), list(y), label=name, color=colour, linewidth=1.8, marker="o" if len(x) == 1 or name in dots else None)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    _dress(axes, legend=len(series) > 1)
    return figure(plot, caption)


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | int | None]],
    y_label: str,
    caption: str = "",
    top: float | int | None = None,
) -> Figure:
    """Bars side by side: per group one bar of every series; None leaves a gap.

    Args:
        groups: names along the x axis.
        series: name -> one value per group.
        y_label: what the bars measure.
        caption: what the plot says.
        top: end of the y axis (1.0 for shares).
    """
    plot = _figure()
    axes = plot.add_subplot()
    width = 0.8 / max(len(series), 1)
    for i, ((name, values), colour) in enumerate(zip(series.items(), _cycled(len(series)), strict=True)):
        places = [g + (i - (len(series) - 1) / 2) * width for g, v in enumerate(values) if v is not None]
        axes.bar(places, [v for v in values if v is not None], width * 0.92, label=name, color=colour)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(y_label)
    if top is not None:
        axes.set_ylim(0, top)
    _dress(axes, legend=len(series) > 1)
    return figure(plot, caption)


def figure(plot: "MplFigure", caption: str = "") -> Figure:
    """Any matplotlib figure as a section; ids are made unique to it, so that plots on one page do not mix."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmtp"}):
        plot.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub("<metadata>.*?</metadata>", "", svg[svg.index("<svg") :].strip(), flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--line)")
    own = hashlib.sha256((caption + svg).encode()).hexdigest()[:8]
    return Figure(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}-", svg), caption)


def _figure() -> "MplFigure":
    from matplotlib.figure import Figure as MplFigure

    return MplFigure(figsize=(7.2, 3.0), layout="constrained")


def _dress(axes, legend: bool) -> None:  # pyrefly: ignore
    """Quiet axes in the page's own colours."""
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_INK, labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    if legend:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)


def _cycled(n: int) -> list[str]:
    return [SERIES_COLOURS[i % len(SERIES_COLOURS)] for i in range(n)]


def _caption(text: str) -> str:
    return f"<p class=caption>{html.escape(text)}</p>" if text else ""


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def _is_number(cell: Cell) -> bool:
    """Numbers, and strings that begin like one ("98.1 %", "1.9 ×"), and dashes."""
    return cell is None or isinstance(cell, int | float) or cell[:1].isdigit() or cell[:2].lstrip("+-−").isdigit() or cell in ("–", "")
