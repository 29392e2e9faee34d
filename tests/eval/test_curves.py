from dataclasses import dataclass
from typing import ClassVar

import pytest

from mmtp.eval import curves
from mmtp.eval.curves import Point, RateResult, few_codebooks
from mmtp.eval.report import lines
from mmtp.types import Modality, TokenizerSpec


@dataclass(frozen=True)
class Loud(Point):
    COLUMNS: ClassVar = {"bytes": ("bytes", "{:.0f}"), "loss": ("loss", "{:.1f}"), "score": ("score", "{:.2f}")}
    AXES: ClassVar = {"bytes": "bytes", "loss": "loss", "score": "score"}
    SETTING: ClassVar = "at {}"

    loss: float
    score: float | None


def result(*notes: str) -> RateResult[Loud]:
    curve = [Loud("codec", "2", 400, 1.0, None), Loud("codec", "1", 100, 3.0, 0.5)]
    return RateResult(Loud("mine", "", 200, 2.5, 0.7), curve, notes)


def test_curves_are_read_between_settings_and_not_beyond_them():
    between = result().at("codec", 200)
    assert (between.bytes, between.loss, between.score) == (200, pytest.approx(2.0), None)
    assert result().at("codec", 99) is None and result().at("codek", 200) is None
    assert result().at("codec", 1000).setting == "2"


def test_tables_and_figures_show_what_is_known():
    table = result("codec: not all of it").table("Title")
    assert table.columns == ["", "at", "bytes", "loss", "score"]
    assert table.rows == [
        ["mine", "all of it", "200", "2.5", "0.70"],
        ["codec", "equal bytes", "200", "2.0", None],
        ["codec", "2 × the bytes", "400", "1.0", None],
        ["codec", "smallest (at 1)", "100", "3.0", "0.50"],
    ]
    assert table.caption == "Title. codec: not all of it"
    assert ">score<" in result().figure(measure="score").svg and ">loss<" in result().figure().svg


def test_points_with_fewer_codebooks_stand_in_table_and_figure(monkeypatch):
    full = result()
    curve = RateResult(full.tokenizer, full.codecs, fewer=[Loud("mine", "the first codebook", 50, 4.0, None)])
    assert curve.table().rows[:2] == [["mine", "the first codebook", "50", "4.0", None], ["mine", "all of it", "200", "2.5", "0.70"]]
    assert curve.to_dict()["fewer_codebooks"] == [vars(curve.fewer[0])] and "fewer_codebooks" not in full.to_dict()
    drawn = []
    monkeypatch.setattr(curves, "lines", lambda *values, **options: (drawn.append((values, options)), lines(*values, **options))[1])
    curve.figure("Caption")
    ((series, *labels), options), *_ = drawn
    assert series == {"codec": ([100, 400], [3.0, 1.0]), "mine": ([50, 200], [4.0, 2.5])}
    assert labels == ["bytes", "loss", "Caption"] and options["dots"] == ["mine"]


def test_measures_that_nobody_took_have_no_place():
    silent = RateResult(Loud("mine", "", 200, 2.5, None), [Loud("codec", "1", 100, 3.0, None)])
    assert silent.table().columns == ["", "at", "bytes", "loss"]
    assert len(silent.figures()) == 1 and len(result().figures()) == 2


@pytest.mark.parametrize(
    ("codebooks", "residual", "counts"), [(1, True, []), (2, True, [1]), (6, True, [1, 2, 4]), (8, True, [1, 2, 4]), (8, False, [])]
)
def test_residual_tokenizers_are_measured_with_fewer_codebooks(codebooks, residual, counts):
    spec = TokenizerSpec(modality=Modality.IMAGE, codebook_sizes=(4,) * codebooks, residual=residual)
    assert few_codebooks(spec) == counts


def test_notes_are_written_only_where_there_are_some():
    assert "notes" not in result().to_dict()
    assert result("a").to_dict()["notes"] == ["a"]
