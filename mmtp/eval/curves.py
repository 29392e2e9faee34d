"""A tokenizer's point among the curves of codecs: what rate and distortion of pictures and of sounds have in common."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar

from mmtp.eval.report import Figure, Table, lines
from mmtp.types import TokenizerSpec

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@dataclass(frozen=True)
class Point:
    """What a codec takes and loses at one setting, as means over a set. Subclasses add their measures as fields.

    Attributes:
        name: codec or tokenizer.
        setting: its quality.
        bytes: what it takes.
    """

    COLUMNS: ClassVar[dict[str, tuple[str, str]]]
    """Field to title and format, in the order of a table."""
    AXES: ClassVar[dict[str, str]]
    """Field to the label of its axis in figures: ``bytes``, then what is put over it."""
    SETTING: ClassVar[str]
    """How a setting is spoken of."""

    name: str
    setting: str
    bytes: float


P = TypeVar("P", bound=Point)


@dataclass(frozen=True)
class RateResult(Generic[P]):
    """A tokenizer's point, or its curve where it is residual, and the curves of the codecs.

    Attributes:
        tokenizer: its point, with all of its codebooks.
        codecs: points of all codecs.
        notes: what is missing, a line each.
        fewer: its points with the first few codebooks only.
    """

    tokenizer: P
    codecs: Sequence[P]
    notes: Sequence[str] = ()
    fewer: Sequence[P] = ()

    def at(self, codec: str, budget: float) -> P | None:
        """What a codec reaches at so many bytes, linear between its settings in the logarithm of bytes.

        None where not even its lowest quality is as small.
        """
        curve = self._curve(codec)
        if not curve or budget < curve[0].bytes:
            return None
        if budget >= curve[-1].bytes:
            return curve[-1]
        right = next(i for i, p in enumerate(curve) if p.bytes > budget)
        low, high = curve[right - 1], curve[right]
        share = math.log(budget / low.bytes) / math.log(high.bytes / low.bytes)
        between = (_between(getattr(low, f.name), getattr(high, f.name), share) for f in fields(low)[3:])
        return type(low)(codec, f"{low.setting} to {high.setting}", budget, *between)

    def table(self, caption: str = "") -> Table:
        """The tokenizer, then every codec at equal bytes, at twice the bytes, and at its smallest; notes below.

        A measure that was taken nowhere has no column.
        """
        columns = {field: column for field, column in self.tokenizer.COLUMNS.items() if self._measured(field)}
        rows = [self._row(point, point.setting) for point in self.fewer] + [self._row(self.tokenizer, "all of it")]
        for codec in self._names():
            for times in (1, 2):
                point = self.at(codec, times * self.tokenizer.bytes)
                label = "equal bytes" if times == 1 else f"{times} × the bytes"
                rows.append(self._row(point, label) if point else [codec, label, *(None for _ in columns)])
            smallest = self._curve(codec)[0]
            rows.append(self._row(smallest, f"smallest ({smallest.SETTING.format(smallest.setting)})"))
        return Table(
            ["", "at", *(title for title, _ in columns.values())], rows, ". ".join(line for line in (caption, *self.notes) if line)
        )

    def figure(self, caption: str = "", measure: str = "") -> Figure:
        """A measure over bytes.

        Args:
            caption: what the plot says.
            measure: a key of the points' ``AXES``; empty for the first after bytes.
        """
        axes = self.tokenizer.AXES
        measure = measure or list(axes)[1]
        series = {codec: self._line(self._curve(codec), measure) for codec in self._names()}
        series[self.tokenizer.name] = self._line([*self.fewer, self.tokenizer], measure)
        return lines(series, axes["bytes"], axes[measure], caption, log_x=True, dots=[self.tokenizer.name])

    def figures(self, caption: str = "") -> list[Figure]:
        """One for every measure of the axes that was taken."""
        return [self.figure(caption, measure) for measure in list(self.tokenizer.AXES)[1:] if self._measured(measure)]

    def to_dict(self) -> dict[str, Any]:
        return (
            {"tokenizer": vars(self.tokenizer), "codecs": [vars(p) for p in self.codecs]}
            | ({"fewer_codebooks": [vars(p) for p in self.fewer]} if self.fewer else {})
            | ({"notes": list(self.notes)} if self.notes else {})
        )

    def _measured(self, field: str) -> bool:
        return any(getattr(point, field) is not None for point in (self.tokenizer, *self.fewer, *self.codecs))

    def _names(self) -> list[str]:
        return list(dict.fromkeys(p.name for p in self.codecs))

    def _columns(self) -> dict[str, tuple[str, str]]:
        points = [self.tokenizer, *self.codecs]
        return {field: how for field, how in self.tokenizer.COLUMNS.items() if any(getattr(p, field) is not None for p in points)}

    def _curve(self, codec: str) -> list[P]:
        return sorted((p for p in self.codecs if p.name == codec), key=lambda p: p.bytes)

    def _line(self, curve: Sequence[P], measure: str) -> tuple[list[float], list[float]]:
        known = [p for p in curve if getattr(p, measure) is not None]
        return [p.bytes for p in known], [getattr(p, measure) for p in known]

    def _row(self, point: P, label: str) -> list[str | None]:
        values = ((getattr(point, field), form) for field, (_, form) in point.COLUMNS.items() if self._measured(field))
        return [point.name, label, *(None if value is None else form.format(value) for value, form in values)]


def few_codebooks(spec: TokenizerSpec) -> list[int]:
    """With how many codebooks, fewer than all, a residual tokenizer is measured: 1, 2, 4 and so on; none for other tokenizers."""
    return [2**i for i in range((spec.num_codebooks - 1).bit_length())] if spec.residual else []


def first_codebooks(count: int) -> str:
    """The setting of a tokenizer's point with so many of its codebooks."""
    return "the first codebook" if count == 1 else f"the first {count} codebooks"


def _between(low: float | None, high: float | None, share: float) -> float | None:
    return None if low is None or high is None else low + share * (high - low)
