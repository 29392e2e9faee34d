import numpy as np
import torch

from mmtp.stream.template import Turn, encode_document
from mmtp.stream.words import Speech, is_text, skeleton, speeches
from mmtp.types import Modality, Segment
from tests.models.common import LAYOUT


def text(*ids: int) -> Segment:
    return Segment(Modality.TEXT, torch.tensor(ids))


def picture(code: int, grid: tuple[int, int] = (2, 3)) -> Segment:
    return Segment(Modality.IMAGE, torch.full((1, *grid), code))


def test_a_document_says_who_says_what() -> None:
    turns = (Turn("user", (text(1, 2), picture(5), text(3))), Turn("assistant", (picture(6),)), Turn("user", (text(4),)))
    tokens = encode_document(LAYOUT, turns).tokens
    said = speeches(skeleton(tokens, LAYOUT), LAYOUT)
    assert said == [Speech("user", [[1, 2], [3]]), Speech("assistant", []), Speech("user", [[4]])]
    assert [id_ for speech in said for run in speech.runs for id_ in run] == LAYOUT.text_ids(tokens).tolist()
    np.testing.assert_array_equal(tokens[is_text(tokens, LAYOUT)], LAYOUT.text_ids(tokens) + LAYOUT.text_range[0])


def test_words_outside_of_turns_have_no_role() -> None:
    tokens = encode_document(LAYOUT, (picture(5), text(7, 8))).tokens
    assert speeches(skeleton(tokens, LAYOUT), LAYOUT) == [Speech(None, [[7, 8]])]
    assert speeches(skeleton(encode_document(LAYOUT, (picture(5),)).tokens, LAYOUT), LAYOUT) == []


def test_media_leave_no_trace_but_their_place() -> None:
    def of(*pieces: Segment) -> list[int]:
        return skeleton(encode_document(LAYOUT, pieces).tokens, LAYOUT).tolist()

    assert of(picture(5), text(7)) == of(picture(6, (4, 1)), text(7))
    assert of(picture(5), text(7)) != of(text(7), picture(5)) != of(text(7))
