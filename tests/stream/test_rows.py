import pytest
import torch

from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.rows import above
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.types import Modality, Segment


def layout_of(delays: tuple[int, ...]) -> VocabLayout:
    return VocabLayout(
        TextEntry("words", 20),
        (
            MediaEntry(Modality.IMAGE, "pictures", "", (5, 3), delays),
            MediaEntry(Modality.AUDIO, "sounds", "", (4,)),
            MediaEntry(Modality.VIDEO, "films", "", (4, 4)),
        ),
        max_dim=6,
    )


def documents(layout: VocabLayout) -> list:
    """Pictures of several shapes beside each other, films, sounds and words."""
    grids = [((1, 4), (2, 3, 2)), ((3, 1), (2, 1, 3)), ((3, 5), (1, 2, 2)), ((4, 2), (3, 3, 1))]

    def segment(modality: Modality, *shape: int) -> Segment:
        return Segment(modality, torch.zeros(shape, dtype=torch.long))

    return [
        encode_document(
            layout,
            (
                Turn("user", (segment(Modality.TEXT, 3), segment(Modality.IMAGE, 2, *picture))),
                Turn("assistant", (segment(Modality.IMAGE, 2, *other), segment(Modality.AUDIO, 1, 3))),
                Turn("assistant", (segment(Modality.VIDEO, 2, *film),)),
            ),
        )
        for (picture, film), (other, _) in zip(grids, reversed(grids), strict=True)
    ]


@pytest.mark.parametrize("delays", [(), (0, 1)], ids=["flat", "delayed"])
def test_both_forms_find_the_code_one_row_up(delays: tuple[int, ...]) -> None:
    layout = layout_of(delays)
    grammar, found = StreamGrammar(layout), set()
    encoded = documents(layout)
    packed = collate([(d.tokens, d.target_mask) for d in encoded], grammar, 160)
    distances = above(packed, layout)
    assert int(packed.document_ids.max()) > 0  # several share a row
    for document in encoded:
        info, state, wanted = grammar.analyse(document.tokens), grammar.begin(), []
        places = {}
        for i, (token, k, coordinate) in enumerate(zip(document.tokens.tolist(), info.codebook, info.coordinates.tolist(), strict=True)):
            if k == -1:
                places = {}  # outside of the body: another grid
            time, row, column = coordinate
            places[k, time, row, column] = i
            modality = state.modality
            up = places.get((k, time, row - 1, column)) if modality is not Modality.IMAGE or not delays else None
            wanted.append(0 if k == -1 or modality is Modality.AUDIO or up is None else i - up)
            assert state.above == wanted[-1], (i, modality, coordinate)
            state.push(token)
        rows = [
            packed_row[start : start + len(wanted)].tolist()
            for packed_row, tokens in zip(distances, packed.tokens, strict=True)
            for start in range(len(tokens) - len(wanted) + 1)
            if tokens[start : start + len(wanted)].tolist() == document.tokens.tolist()
        ]
        assert wanted in rows
        found |= set(wanted)
    assert {0, 2, 4} <= found and (10 in found) is (not delays)
