"""Spans are data: what a layout says is what its rules say."""

import pytest

from mmtp.stream.rules import GrammarError, span_rules
from mmtp.stream.vocab import MediaEntry, Special, VocabLayout
from mmtp.types import Modality


def test_rules_follow_from_the_layout():
    layout = VocabLayout(
        None,
        (
            MediaEntry(Modality.VIDEO, "v", "", (4,)),
            MediaEntry(Modality.AUDIO, "a", "", (4, 4, 4), (0, 3, 1)),
            MediaEntry(Modality.IMAGE, "f"),
        ),
    )
    rules = span_rules(layout)
    assert set(rules) == {Special.BOV, Special.BOA, Special.BOF}
    names = [slot.name for slot in layout.slots]
    video, audio, features = (rules[opener] for opener in (Special.BOV, Special.BOA, Special.BOF))
    assert (video.num_dims, audio.num_dims, features.num_dims) == (3, 0, 2)
    assert [names[s] for s in audio.boundary_slots] == ["audio.boundary.2", "audio.boundary.2", "audio.boundary.1"]
    assert [names[s] for s in features.code_slots] == ["feature.codes.0"] and features.continuous
    assert not video.boundary_slots and names[video.close_slot] == "video.end"
    assert audio.ranges == tuple(layout.code_range(Modality.AUDIO, k) for k in range(3))


def test_errors_carry_offset_and_expectation():
    with pytest.raises(GrammarError, match="^offset 17: <eoi> expected, found <bos>$") as caught:
        raise GrammarError(17, "<eoi>", "<bos>")
    assert (caught.value.offset, caught.value.expected) == (17, "<eoi>")
