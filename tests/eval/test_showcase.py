import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtp.data.restore import Part, Restored
from mmtp.data.shards import Row
from mmtp.decode.stats import DecodeStats
from mmtp.eval.decoding import DecodingResult, Pair
from mmtp.eval.generation import Drawing, DrawingResult
from mmtp.eval.report import Figure, Heading, Pictures, Table, Text, render
from mmtp.eval.shapes import Parsed
from mmtp.eval.showcase import (
    Contestant,
    answer_gallery,
    comparison,
    decoding_sections,
    drawing_sections,
    judged_table,
    read_log,
    shard_sections,
    summary_tiles,
    training_sections,
)
from mmtp.eval.vqa import OTHER_PICTURE, WITH_PICTURE, WITHOUT_PICTURE, VqaResult, VqaSample, score
from mmtp.types import Modality

BLANK = torch.ones(3, 8, 8)
SAMPLES = [VqaSample(f"p{i // 2}", BLANK, f"what color is it, {i}?", "red") for i in range(6)]


def answers(right: int) -> VqaResult:
    given = {
        WITH_PICTURE: ["red"] * right + ["blue"] * (6 - right),
        WITHOUT_PICTURE: ["blue"] * 6,
        OTHER_PICTURE: ["red"] + ["blue"] * 5,
    }
    return VqaResult({c: score(SAMPLES, a) for c, a in given.items()}, given)


def drawings() -> DrawingResult:
    return DrawingResult(
        [
            Drawing("red", "circle", 0, BLANK, Parsed("circle", "red", 9.0, 1)),
            Drawing("blue", "circle", 0, BLANK, Parsed(None, None, 0.0, 0)),
        ]
    )


def decoding(equal: bool = True) -> DecodingResult:
    plain = DecodeStats(per_pass=[1] * 60, seconds=2.0)
    fast = DecodeStats(per_pass=[3] * 20, seconds=1.0, drafted=Counter({("image", 1): 20}), accepted=Counter({("image", 1): 15}))
    return DecodingResult([Pair("picture", 1.0, plain, fast, equal, [1]), Pair("answer", 1.0, plain, fast, True, [2])])


def contestants() -> list[Contestant]:
    return [
        Contestant("fresh", 1_234_567, answers(3), drawings(), decoding(equal=False)),
        Contestant("zoo", 13_000_000, answers(6), drawings(), decoding()),
    ]


def test_models_stand_side_by_side():
    table = comparison(contestants())
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert list(table.columns) == ["", "fresh", "zoo"]
    assert rows["parameters"] == ["1.2 M", "13.0 M"]
    assert rows["answers right"] == ["50.0 %", "100.0 %"]
    assert rows["… without a picture"] == ["0.0 %", "0.0 %"]
    assert rows["… with another picture"] == ["16.7 %", "16.7 %"]
    assert rows["drawings right"] == ["50.0 %", "50.0 %"]
    assert rows["tokens per pass, pictures"] == ["3.00", "3.00"]
    assert rows["speed with MTP, pictures"] == ["2.00 ×", "2.00 ×"]
    assert rows["MTP output equal to plain output"] == ["1 of 2", "2 of 2"]


def test_tiles_show_the_last_model():
    assert [value for value, _, _ in summary_tiles(contestants()[-1]).tiles] == ["100.0 %", "50.0 %", "2.00 ×", "2 of 2"]


def test_training_is_drawn_per_modality_and_offset(tmp_path):
    log = tmp_path / "log.jsonl"
    one = {"text": 3.0, "text+1": 4.0, "text+1.accuracy": 0.1, "image": 5.0, "tokens_per_second": 1000.0}
    records = [{"step": step, **one} for step in (1, 2, 3)]
    log.write_text("".join(json.dumps(r) + "\n" for r in records))
    sections = training_sections(read_log(log))
    assert [type(s) for s in sections] == [Figure, Figure, Text]
    assert sections[-1] == Text("3 steps, 1,000 tokens per second at the end.")
    assert training_sections([]) == [Text("The run was too short for a record.")]


def test_the_gallery_shows_each_picture_once_and_marks_mistakes():
    gallery = answer_gallery(SAMPLES, {"fresh": answers(3), "zoo": answers(6)})
    assert len(gallery.images) == 3
    assert gallery.labels[0] == "what color is it, 0? fresh: red, zoo: red"
    assert list(gallery.good) == [True, True, False]


def test_all_sections_make_a_page():
    judged = judged_table({"fresh": drawings()}, drawings(), drawings())
    assert [row[2] for row in judged.rows] == ["50.0 %"] * 3
    sections = [
        *drawing_sections({"fresh": drawings()}),
        *decoding_sections({"fresh": decoding()}),
        *shard_sections([restored("a"), restored("b")], Path("somewhere/pictures")),
    ]
    kinds = [type(s) for s in sections]
    assert kinds == [Heading, Pictures, Table, Heading, Table, Figure, Table, Pictures, Table]
    page = render("t", sections)
    assert "somewhere/pictures" in page and "user: draw a red circle / assistant: &lt;image 2x2&gt;" in page


def restored(key: str) -> Restored:
    row = Row(key, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool), {"input": key})
    words = Part(Modality.TEXT, "user", np.zeros(3, dtype=np.int64), "draw a red circle")
    return Restored(row, (words, Part(Modality.IMAGE, "assistant", np.zeros((1, 2, 2), dtype=np.int64), BLANK)))


@pytest.mark.parametrize("count", [1, 2])
def test_pictures_of_one_input_are_shown_once(count):
    pictures = shard_sections([restored("same")] * count, Path("x"))[0]
    assert isinstance(pictures, Pictures) and len(pictures.images) == 1
