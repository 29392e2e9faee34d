import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from rich.console import Console

from mmtp.eval.report import Figure, Heading, Pictures, Sounds, Table, Text, Tiles, bars, flac_uri, lines, png_uri, render, write_report

VOID = {"meta", "img", "br", "path", "use", "rect", "line"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def everything() -> list:
    return [
        Heading("First <part>"),
        Text("one & two\n\nthree <script>alert(1)</script>"),
        Tiles([("98.5 %", "answers", "prior 36 %")]),
        Table(["model", "right", "n"], [["<b>", "98.1 %", 9673], ["prior", None, 12]], "caption & more"),
        Heading("Second"),
        lines({"text": ([1, 2, 3], [3.0, 2.0, 1.5]), "image": ([1, 2, 3], [5.0, 4.0, 2.0])}, "step", "loss", "losses", log_y=True),
        bars(["a", "b"], {"plain": [1.0, None], "mtp": [0.5, 2.0]}, "tokens"),
        Pictures([torch.rand(3, 8, 8), torch.rand(3, 4, 6)], ['"quoted"', "b"], good=[True, False]),
        Sounds(["before", "after"], [("hel<lo", [torch.rand(1, 50), torch.rand(1, 60)])], 8000, "sounds"),
    ]


def test_the_page_is_balanced_escaped_and_needs_nothing_else():
    page = render("Title & <i>", everything(), "sub<title>")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "<script" not in page and "<title>Title &amp; &lt;i&gt;</title>" in page
    assert all(address.startswith(("data:image/png;base64,", "data:audio/flac;base64,", "#")) for address in parser.addresses)
    assert "prefers-color-scheme:dark" in page
    assert 'href="#part-1"' in page and 'id="part-1"' in page
    assert not re.search(r"""(src|href)=["']?http""", page)


def test_plots_take_text_and_grid_from_the_page_and_keep_their_ids_apart():
    one = lines({"a": ([1, 2], [1.0, 2.0])}, "x", "first")
    two = lines({"a": ([1, 2], [2.0, 1.0])}, "x", "second")
    for figure in (one, two):
        assert "currentColor" in figure.svg and "var(--line)" in figure.svg
        assert "#010203" not in figure.svg and "#040506" not in figure.svg
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', f.svg)) for f in (one, two)]
    assert clips[0] and clips[1] and not clips[0] & clips[1]
    assert one == lines({"a": ([1, 2], [1.0, 2.0])}, "x", "first")


def test_points_of_a_curve_are_marked_where_asked_for():
    curve = {"a": ([1, 2, 3], [1.0, 3.0, 2.0])}
    marked, plain = lines(curve, "x", "y", dots=["a"]), lines(curve, "x", "y", dots=["b"])
    # Every mark is drawn by a <use>, and there is one more beside the name of the curve where there are several.
    assert marked.svg.count("<use") - plain.svg.count("<use") == 3


def test_pictures_survive_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    uri = png_uri(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_sounds_survive_to_16_bits():
    sound = torch.rand(1, 301) * 2 - 1
    read, rate = soundfile.read(io.BytesIO(base64.b64decode(flac_uri(sound, 12000).partition(",")[2])), dtype="float32")
    assert rate == 12000 and np.abs(read - sound[0].numpy()).max() <= 2**-15
    page = Sounds(["a", "b"], [("one", [sound, sound])] * 2, 12000).html()
    assert page.count("<audio controls") == 4
    with pytest.raises(AssertionError):
        Sounds(["a"], [("one", [sound, sound])], 12000).html()


def test_numbers_stand_to_the_right_in_both_renderings():
    table = Table(["name", "share", "count"], [["a [x]", "98.1 %", 1234567], ["b", None, -3]], "what")
    page = table.html()
    assert page.count('class="n"') == 6 and "1,234,567" in page and "–" in page
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table.rich())
    shown = console.export_text()
    assert "a [x]" in shown and "1,234,567" in shown and "what" in shown


def test_rows_must_fit_the_columns():
    with pytest.raises(AssertionError):
        Table(["a", "b"], [["only one"]])


def test_written_whole(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", "T", [Text("hello"), Figure("<svg></svg>", "c")])
    assert path.is_absolute() and path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
