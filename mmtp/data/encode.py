"""From a range of inputs to one shard."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmtp.config import Config
from mmtp.data.errors import DataError, DecodeError, Reason
from mmtp.data.labels import CAPTION, captions, check_wording, questions, timed
from mmtp.data.manifest import PLAN, ShardRecord, shard_name
from mmtp.data.media import MAX_PIXELS, MAX_SECONDS, Fit, decode_image, decode_sound
from mmtp.data.plan import Plan
from mmtp.data.shards import Quarantined, ShardBuilder, ShardHead
from mmtp.data.sources import Item, Sample, Source
from mmtp.data.storage import digest, write_durable
from mmtp.data.video import decode_video
from mmtp.stream.template import TEMPLATES, EncodedDocument, EncodeText, encode_document, feature_places
from mmtp.stream.template import Sample as TemplateSample
from mmtp.stream.vocab import VocabLayout
from mmtp.tokenizers.base import ContinuousTokenizer, DiscreteTokenizer
from mmtp.tokenizers.continuous.base import plane
from mmtp.types import Codes, Latents, MmtpError, Modality, Segment

BATCH_ITEMS, BATCH_VALUES = 64, 2**23
"""Media decoded at a time, and numbers in them: what bounds the memory of a worker."""

WORDLESS = ("plain",)
WRITTEN = {"draw": Modality.IMAGE, "say": Modality.AUDIO, "read": Modality.AUDIO}
"""Tasks in which a model writes the medium, and which."""

Flips = Literal["none", "horizontal", "vertical", "all"]
FLIPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "horizontal": ((), (2,)),
    "vertical": ((), (1,)),
    "all": ((), (2,), (1,), (1, 2)),
}
"""Axes of ``[c, h, w]`` that each variant of a picture mirrors."""


@runtime_checkable
class WritesText(Protocol):
    """All that templates ask of a text tokenizer."""

    def encode_text(self, text: str) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig(Config):
    """How inputs become documents.

    Attributes:
        tasks: names of :data:`mmtp.stream.template.TEMPLATES`; each writes its documents of every input that has the labels.
        size: (height, width) to bring pictures and frames of videos to; None keeps their own.
        fit: how, see :func:`~mmtp.data.media.decode_image`.
        captions: how captions are worded, with labels in braces (``"{caption}, {style} style"``); tasks that write a caption write a
            document in each wording whose labels the input has.
        questions_per_document: for ``vqa`` and ``vqa-blind``: how many of a picture's questions share one document.
        flips: mirror images that are written besides each picture: ``horizontal``, ``vertical`` or ``all`` (both, and both at once).
            Their words stay, so this is for pictures in which left and right, above and below are not spoken of.
        shifts: further variants of each sound, picture and mirror image, each moved by up to half a cell of codes along its axes (borders
            repeat), so that a shape is seen on many places of the grid; drawn at random, the same for the same input.
        codebooks: of a residual tokenizer, how many of its codebooks are written, from the first on: fewer codes, at a lower bit rate; 0
            writes all.
        max_dim: greatest extent of a grid of codes along one axis.
        merge: for continuous tokenizers: cells per side that the model's ``projector`` joins into one, so that streams have fewer places.
        queries: for continuous tokenizers: vectors that the model's ``resampler`` makes of any grid; 0 for none.
        max_pixels: larger pictures and frames go to quarantine.
        max_seconds: longer sounds go to quarantine.
        shard_inputs: inputs per shard; None cuts into about 64 shards of 256 to 65,536 inputs.
    """

    tasks: tuple[str, ...] = ("plain",)
    size: tuple[int, int] | None = None
    fit: Fit = "crop"
    captions: tuple[str, ...] = (CAPTION,)
    questions_per_document: int = 1
    flips: Flips = "none"
    shifts: int = 0
    codebooks: int = 0
    max_dim: int = 64
    merge: int = 1
    queries: int = 0
    max_pixels: int = MAX_PIXELS
    max_seconds: float = MAX_SECONDS
    shard_inputs: int | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TEMPLATES:
                raise DataError(f"task {task!r} is not one of {', '.join(TEMPLATES)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise DataError(f"tasks {list(self.tasks)}: at least one is wanted, and each only once")
        for wording in self.captions:
            check_wording(wording)
        if not self.max_seconds > 0:
            raise DataError(f"max_seconds: a number above 0 is wanted, {self.max_seconds} given")
        for name in ("questions_per_document", "max_dim", "merge", "max_pixels", "shard_inputs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise DataError(f"{name}: at least 1 is wanted, {value} given")
        for name in ("shifts", "queries", "codebooks"):
            if (value := getattr(self, name)) < 0:
                raise DataError(f"{name}: 0 or more is wanted, {value} given")
        if self.queries and self.merge > 1:
            raise DataError(f"merge {self.merge} and queries {self.queries}: a model has a projector or a resampler; give one of the two")
        if self.size is not None and min(self.size) < 1:
            raise DataError(f"size: at least 1 x 1 is wanted, {self.size} given")

    @property
    def draws(self) -> bool:
        """Whether a model is to write the medium, be it codes or vectors."""
        return "draw" in self.tasks

    @property
    def needs_text(self) -> bool:
        return any(task not in WORDLESS for task in self.tasks)


@dataclass
class _Decoded:
    place: int
    sample: Sample
    medium: Tensor
    meta: dict[str, Any]


class ShardMaker:
    """Makes the shards of a plan, one at a time.

    Args:
        folder: where the plan lies and shards go.
        plan: of the run.
        source: what the plan was made of.
        tokenizer: of the medium.
        text: of words; None where no task writes any.
        head: what shards say of themselves; its range and quarantine are filled in per shard.
        config: of the run.
        writer: goes into temporary names.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        tokenizer: DiscreteTokenizer | ContinuousTokenizer,
        text: WritesText | None,
        layout: VocabLayout,
        fingerprints: dict[str, str],
        config: TokenizeConfig,
        writer: str = "",
    ) -> None:
        self.folder, self.source, self.tokenizer, self.layout = folder, source, tokenizer, layout
        self.fingerprints, self.config, self.writer = fingerprints, config, writer
        self.plan = Plan.read(folder / PLAN)
        self.spec = tokenizer.spec
        if self.spec.modality is not Modality.IMAGE and config.flips != "none":
            raise DataError(f"flips: only pictures can be mirrored, and this tokenizer reads {self.spec.modality}")
        if self.spec.modality is Modality.VIDEO and config.shifts:
            raise DataError(f"shifts: only pictures and sounds can be moved, and this tokenizer reads {self.spec.modality}")
        for task, medium in WRITTEN.items():
            if task in config.tasks and self.spec.modality is not medium:
                raise DataError(f"task {task}: is for {medium}, and this tokenizer reads {self.spec.modality}")
        if self.spec.latent_dim and "read" in config.tasks:
            raise DataError("task read: a model writes the sounds of words as codes, and this tokenizer gives vectors")
        if not self.spec.latent_dim and (config.merge > 1 or config.queries):
            raise DataError("merge and queries: only vectors of a continuous tokenizer are joined or resampled, and this one gives codes")
        if self.spec.latent_dim and config.draws and (config.merge > 1 or config.queries):
            raise DataError("task draw: a model writes vectors one by one; leave out merge and queries")
        self.encode_text: EncodeText = text.encode_text if text is not None else _no_text

    def __call__(self, shard: int) -> ShardRecord:
        """Makes and writes one shard.

        Raises:
            DataError: the source as a whole, or the disk, fails.
        """
        items = self.plan.items(shard)
        builder, quarantine, ok = ShardBuilder(self.layout), [], 0
        for item, outcome in zip(items, self._outcomes(items), strict=True):
            if isinstance(outcome, DecodeError):
                quarantine.append(Quarantined(item.key, item.file, outcome.reason, str(outcome)))
                continue
            ok += 1
            for number, (document, meta) in enumerate(outcome):
                builder.add(f"{item.key}#{number}", document, {"input": item.key, **meta})
        head = ShardHead(self.layout, self.fingerprints, self.config.to_dict(), self.plan.range(shard), tuple(quarantine))
        data = builder.to_bytes(head)
        write_durable(self.folder / shard_name(shard), data, self.writer)
        reasons = [str(q.reason) for q in quarantine]
        counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        return ShardRecord(shard, digest(data), len(data), ok, len(builder.rows), builder.num_tokens, counts)

    def _outcomes(self, items: list[Item]) -> list[DecodeError | list[tuple[EncodedDocument, dict[str, Any]]]]:
        """For each input its documents, or why it has none."""
        outcomes: list[Any] = [None] * len(items)
        batch: list[_Decoded] = []
        for place, item in enumerate(items):
            try:
                sample = self.source.read(item)
                batch.append(_Decoded(place, sample, *self._decode(sample.media)))
            except DecodeError as error:
                outcomes[place] = error
            if len(batch) >= BATCH_ITEMS or sum(d.medium.numel() for d in batch) >= BATCH_VALUES:
                self._encode(batch, outcomes)
                batch = []
        self._encode(batch, outcomes)
        return outcomes

    def _decode(self, media: bytes) -> tuple[Tensor, dict[str, Any]]:
        """The medium, and what its documents say of it besides its size."""
        size, fit, max_pixels = self.config.size, self.config.fit, self.config.max_pixels
        match self.spec.modality:
            case Modality.AUDIO:
                return decode_sound(media, sample_rate=self.spec.sample_rate, max_seconds=self.config.max_seconds)[0], {}
            case Modality.VIDEO:
                video = decode_video(media, size=size, fit=fit, frame_rate=self.spec.sample_rate, max_pixels=max_pixels)
                return video.frames, {"frame_rate": video.frame_rate}
            case _:
                return decode_image(media, size=size, fit=fit, max_pixels=max_pixels), {}

    def _encode(self, batch: list[_Decoded], outcomes: list[Any]) -> None:
        groups: dict[tuple[int, ...], list[_Decoded]] = {}
        for decoded in batch:
            groups.setdefault(tuple(decoded.medium.shape), []).append(decoded)
        for group in groups.values():
            for number, axes in product(range(1 + self.config.shifts), FLIPS[self.config.flips]):
                variants = [self._moved(d, number).flip(axes) for d in group]
                for decoded, body in zip(group, self._bodies(variants), strict=True):
                    before = outcomes[decoded.place] or []
                    if isinstance(before, DecodeError):
                        continue
                    try:
                        outcomes[decoded.place] = body if isinstance(body, DecodeError) else before + self._documents(decoded, body)
                    except DecodeError as error:
                        outcomes[decoded.place] = error

    def _moved(self, decoded: _Decoded, number: int) -> Tensor:
        """The medium itself as number 0, else a picture or sound moved by an amount that its key and the number decide."""
        medium = decoded.medium
        if number == 0:
            return medium
        draw = random.Random(f"{decoded.sample.key} {number}")
        for axis, cell in enumerate(self.spec.downsampling, start=1):
            size = medium.shape[axis]
            medium = medium.index_select(axis, (torch.arange(size) - draw.randint(-(cell // 2), cell // 2)).clamp(0, size - 1))
        return medium

    def _bodies(self, media: list[Tensor]) -> Iterator[Segment | DecodeError]:
        """The codes or vectors of media of one shape, or why they have none."""
        try:
            with torch.no_grad():
                encoded = self.tokenizer.encode(media)
            bodies = [self._body(encoded, i) for i in range(len(media))]
        except MmtpError as error:
            if len(media) > 1:  # one by one, so that the others do not suffer
                for medium in media:
                    yield from self._bodies([medium])
            else:
                yield DecodeError(Reason.NOT_ENCODABLE, str(error))
            return
        yield from bodies

    def _body(self, encoded: Codes | Latents, index: int) -> Segment:
        if isinstance(encoded, Codes):
            return Segment(self.spec.modality, encoded.item(index)[: self.config.codebooks or None])
        features = plane(encoded, index, self.spec.latent_dim).permute(1, 2, 0).half()
        if not features.isfinite().all():
            raise DataError("its vectors reach beyond 65504, the largest number of float16")
        places = feature_places(features.shape[:2], self.config.merge, self.config.queries)
        return Segment(self.spec.modality, features=features, places=places)

    def _documents(self, decoded: _Decoded, segment: Segment) -> list[tuple[EncodedDocument, dict[str, Any]]]:
        labels = decoded.sample.labels
        said = captions(labels, self.config.captions)
        sample = TemplateSample(segment, tuple(said), questions(labels), self._words(segment, labels))
        meta = {"size": list(decoded.medium.shape[1:]), **decoded.meta} | ({"caption": said[0]} if said else {})
        documents = []
        for task in self.config.tasks:
            for pieces in TEMPLATES[task](sample, self.encode_text, self.config.questions_per_document):
                try:
                    documents.append((encode_document(self.layout, pieces), {"task": task, **meta}))
                except MmtpError as error:
                    raise DecodeError(Reason.NOT_ENCODABLE, str(error)) from error
        if not documents:
            raise DecodeError(Reason.NO_LABELS, f"no labels for {', '.join(self.config.tasks)}; it has {', '.join(labels) or 'none'}")
        return documents

    def _words(self, segment: Segment, labels: dict[str, Any]) -> tuple[tuple[str, int], ...]:
        """Words and the frames of codes at which they begin; those that begin in the same frame belong together."""
        words: list[tuple[str, int]] = []
        if "read" in self.config.tasks:
            per_second = (self.spec.sample_rate or 0) / self.spec.downsampling[0]
            for word, seconds in timed(labels):
                frame = round(seconds * per_second)
                if words and words[-1][1] == frame:
                    words[-1] = f"{words[-1][0]} {word}", frame
                elif frame < segment.shape[0]:
                    words.append((word, frame))
        return tuple(words)


def _no_text(text: str) -> list[int]:
    raise AssertionError("only tasks without words go without a text tokenizer")
