"""The vectorised walk: spans it reports, and that its work grows with spans, not with tokens."""

import numpy as np

from mmtp.stream import analysis
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.types import Modality

LAYOUT = VocabLayout(TextEntry("bpe", 50), (MediaEntry(Modality.AUDIO, "sounds", "", (8, 8), (0, 1)),))
GRAMMAR = StreamGrammar(LAYOUT)


def sound(frames: int) -> list[int]:
    _, codebook, _ = LAYOUT.entry(Modality.AUDIO).pattern.order(frames)
    return [9, *(LAYOUT.code_range(Modality.AUDIO, int(k))[0] for k in codebook), 10]


def test_spans_know_where_they_lie():
    tokens = np.array([1, 40, *sound(3), 41, *sound(1), 2])
    first, second = GRAMMAR.spans(tokens)
    assert (first.start, first.body_start, first.end, first.grid) == (2, 3, 10, (3,))
    assert first.body == slice(3, 9)
    assert (second.start, second.end, second.grid) == (11, 15, (1,))


def test_an_open_span_is_not_reported():
    tokens = [1, *sound(3), *sound(4)]
    assert [span.grid for span in GRAMMAR.spans(np.array(tokens[:-1]))] == [(3,)]


def test_work_grows_with_spans_not_with_tokens(monkeypatch):
    """Long text and long sound take no more steps of Python than short ones."""

    def steps(tokens: list[int]) -> int:
        calls = []
        place = analysis._Walk._place
        monkeypatch.setattr(analysis._Walk, "_place", lambda *args: (calls.append(1), place(*args))[1])
        GRAMMAR.analyse(np.array(tokens), complete=True)
        monkeypatch.undo()
        return len(calls)

    short = steps([1, 40, *sound(2), 40, 2])
    assert steps([1, *[40] * 5000, *sound(3000), *[40] * 5000, 2]) == short
    assert steps([1, *[40] * 5000, *sound(3000), *sound(10), *[40] * 5000, 2]) > short
