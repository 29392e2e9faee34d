"""What tokenizers are measured on: the pictures, recordings or videos of one or several sources, one after another."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mmtp.data.errors import DecodeError
from mmtp.data.media import decode_image, decode_sound, grid_crops
from mmtp.data.sources import Item, Source, open_source
from mmtp.data.video import decode_video
from mmtp.eval.codes import EvalError
from mmtp.eval.sound import Recording
from mmtp.types import Modality

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


class Inputs:
    """The union of some sources, in their order.

    Args:
        sources: as :func:`~mmtp.data.sources.open_source` takes them.
        modality: which media are wanted of them.
        limit: only the first so many.
        progress: called with inputs read and inputs in all.

    Attributes:
        unreadable: what could not be read and why, a line each.
        small: what was smaller than a crop, a line each.

    Raises:
        DataError: there is no such source.
    """

    def __init__(
        self, sources: Sequence[str], modality: Modality = Modality.IMAGE, limit: int | None = None, progress: Progress | None = None
    ) -> None:
        opened = [open_source(source, modality) for source in sources]
        self._items: list[tuple[Source, Item]] = [(source, item) for source in opened for item in source.items()][:limit]
        self._progress = progress
        self.unreadable: list[str] = []
        self.small: list[str] = []

    def pictures(self, size: tuple[int, int] | None = None, crop: tuple[int, int] | None = None) -> Iterator[Float[Tensor, "3 h w"]]:
        """Pictures in [0, 1].

        Args:
            size: (height, width) that each is brought to; None keeps its own.
            crop: (height, width) of the crops that each is then cut into, see :func:`~mmtp.data.media.grid_crops`; None keeps it whole.

        Raises:
            EvalError: no picture is as large as a crop.
        """
        whole = 0
        for source, item in self._walk():
            try:
                picture = decode_image(source.read(item).media, size=size)
            except DecodeError as error:
                self.unreadable.append(f"{item.key}: {error}")
                continue
            crops = [picture] if crop is None else grid_crops(picture, crop)
            whole += bool(crops)
            if not crops:
                self.small.append(f"{item.key}: {picture.shape[2]}x{picture.shape[1]}")
            yield from crops
        if self.small and not whole:
            raise EvalError(f"no picture is as large as a crop; the first: {self.small[0]}")

    def labelled(self, labels: Sequence[str], size: tuple[int, int]) -> Iterator[tuple[Float[Tensor, "3 h w"], dict[str, Any]]]:
        """Pictures in [0, 1] that have all of some labels, brought to a size, with everything that is known of them."""
        for source, item in self._walk():
            try:
                sample = source.read(item)
                picture = decode_image(sample.media, size=size)
            except DecodeError as error:
                self.unreadable.append(f"{item.key}: {error}")
                continue
            if all(sample.labels.get(label) for label in labels):
                yield picture, sample.labels

    def recordings(self, sample_rate: int) -> Iterator[Recording]:
        """Recordings at a rate."""
        for source, item in self._walk():
            try:
                sample = source.read(item)
                sound, _ = decode_sound(sample.media, sample_rate=sample_rate)
            except DecodeError as error:
                self.unreadable.append(f"{item.key}: {error}")
            else:
                yield Recording(sound, sample.labels.get("caption"))

    def videos(self, frame_rate: float | None, size: tuple[int, int] | None = None) -> Iterator[Float[Tensor, "3 t h w"]]:
        """Videos in [0, 1].

        Args:
            frame_rate: frames per second that each is brought to; None keeps its own.
            size: (height, width) that frames are brought to; None keeps their own.
        """
        for source, item in self._walk():
            try:
                video = decode_video(source.read(item).media, size=size, frame_rate=frame_rate)
            except DecodeError as error:
                self.unreadable.append(f"{item.key}: {error}")
            else:
                yield video.frames

    def left_out(self) -> list[tuple[str, str]]:
        """What is missing from the figures, as rows of a table."""
        found = (("unreadable, left out", self.unreadable), ("smaller than a crop, left out", self.small))
        return [(name, f"{len(lines)} (the first: {lines[0]})") for name, lines in found if lines]

    def counts(self) -> dict[str, int]:
        """The same as numbers."""
        return {"unreadable": len(self.unreadable)} | ({"small": len(self.small)} if self.small else {})

    def _walk(self) -> Iterator[tuple[Source, Item]]:
        for done, (source, item) in enumerate(self._items, start=1):
            yield source, item
            if self._progress is not None:
                self._progress(done, len(self._items))
