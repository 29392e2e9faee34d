"""What the incremental and the vectorised grammar share: span rules, as data, and the error both raise."""

from dataclasses import dataclass

from mmtp.stream.patterns import Pattern
from mmtp.stream.vocab import CLOSERS, NUM_DIMS, OPENERS, Range, Special, VocabLayout
from mmtp.types import MmtpError, Modality


class GrammarError(MmtpError):
    """A stream that breaks the grammar.

    Attributes:
        offset: of the first token that may not stand where it stands.
        expected: what may stand there, in words.
    """

    def __init__(self, offset: int, expected: str, found: str) -> None:
        super().__init__(f"offset {offset}: {expected} expected, found {found}")
        self.offset = offset
        self.expected = expected


@dataclass(frozen=True)
class SpanRule:
    """How a span is written: opener, ``num_dims`` dims, a body of codes in pattern order, closer.

    Attributes:
        modality: the medium.
        continuous: whether the body holds placeholders of features instead of codes.
        opener: id that opens the span.
        closer: id that closes it.
        num_dims: dims after the opener; 0 where the length shows only at the end.
        axes: which of time, row and column (0, 1, 2) each dim reaches along. Features of sound lie on time and, by bands, columns.
        pattern: order of the body.
        ranges: ids of each codebook.
        code_slots: slot of each codebook.
        boundary_slots: where there are no dims: slot at the start of a step after 1, 2, … or more frames, where the span may end.
        close_slot: slot of the closer.
    """

    modality: Modality
    continuous: bool
    opener: int
    closer: int
    num_dims: int
    axes: tuple[int, ...]
    pattern: Pattern
    ranges: tuple[Range, ...]
    code_slots: tuple[int, ...]
    boundary_slots: tuple[int, ...]
    close_slot: int


def span_rules(layout: VocabLayout) -> dict[int, SpanRule]:
    """Rules of all spans that a layout allows, by opener."""
    rules = {}
    index = layout.slot_index
    for entry in layout.media:
        name = "feature" if entry.continuous else str(entry.modality)
        codebooks = range(entry.pattern.num_codebooks)
        num_dims = 2 if entry.continuous else NUM_DIMS[entry.modality]
        feature_range = (int(Special.FEATURE), int(Special.FEATURE) + 1)
        rule = SpanRule(
            modality=entry.modality,
            continuous=entry.continuous,
            opener=int(Special.BOF if entry.continuous else OPENERS[entry.modality]),
            closer=int(Special.EOF if entry.continuous else CLOSERS[entry.modality]),
            num_dims=num_dims,
            axes=(0, 2) if entry.continuous and entry.modality is Modality.AUDIO else (0, 1, 2)[3 - num_dims :],
            pattern=entry.pattern,
            ranges=(feature_range,) if entry.continuous else tuple(layout.code_range(entry.modality, k) for k in codebooks),
            code_slots=tuple(index[f"{name}.codes.{k}"] for k in codebooks),
            boundary_slots=() if num_dims else tuple(index[f"{name}.boundary.{k}"] for k in entry.pattern.ramp_down_starts),
            close_slot=index[f"{name}.end"],
        )
        rules[rule.opener] = rule
    return rules


NO_SPAN = SpanRule(Modality.TEXT, False, -1, -1, 0, (), Pattern((0,)), (), (), (), -1)
"""Stands for a rule where no span is open."""
