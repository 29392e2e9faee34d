"""From pictures, words and turns to the ids of a document, with what training predicts of it.

Training documents and generation prompts are written by the same functions, so that a model meets the wording it has learnt.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmtp.stream.vocab import CLOSERS, NUM_DIMS, OPENERS, ROLES, Special, VocabLayout
from mmtp.types import MmtpError, Modality, Segment

EncodeText = Callable[[str], Sequence[int]]
"""Text to local ids: a text tokenizer's ``encode_text``."""


class TemplateError(MmtpError):
    """A document that cannot be written as a stream."""


@dataclass(frozen=True)
class Turn:
    """What one side of a conversation says."""

    role: str
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise TemplateError(f"role {self.role!r} is not one of {', '.join(ROLES)}")


Piece = Segment | Turn
Document = tuple[Piece, ...]


@dataclass(frozen=True)
class SegmentRecord:
    """A run of tokens of one kind; a document's records cover all its tokens.

    Attributes:
        modality: text for words and structure tokens, else the medium of a body.
        length: number of tokens.
        shape: grid of a body; ``(length,)`` for text. For a continuous body that of its vectors, of which ``length`` tokens may read more.
        target: whether training predicts these tokens.
    """

    modality: Modality
    length: int
    shape: tuple[int, ...]
    target: bool


@dataclass(frozen=True)
class EncodedDocument:
    """A document as a stream.

    Attributes:
        tokens: vocabulary ids.
        segments: what the tokens are, run by run.
        features: continuous vectors of all continuous spans, in order; None where there are none.
        feature_grids: extent of every such span's grid of vectors. There may be fewer ``<feature>`` tokens than vectors.
    """

    tokens: Int[np.ndarray, " s"]
    segments: tuple[SegmentRecord, ...]
    features: Float[Tensor, "n d"] | None = None
    feature_grids: Int[np.ndarray, "spans axes"] | None = None

    @property
    def target_mask(self) -> Bool[np.ndarray, " s"]:
        """Whether training predicts each token."""
        return np.repeat([r.target for r in self.segments], [r.length for r in self.segments]).astype(bool)


@dataclass(frozen=True)
class Sample:
    """A medium and what is known of it.

    Attributes:
        medium: its codes (or features, where nothing writes it).
        captions: words for it, in every wording that documents are wanted in.
        questions: (question, answer) pairs.
        words: of a recording, what is said in it and the frame at which it begins, in order.
    """

    medium: Segment
    captions: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    words: tuple[tuple[str, int], ...] = ()


def encode_document(layout: VocabLayout, pieces: Sequence[Piece]) -> EncodedDocument:
    """Writes a document from ``<bos>`` to ``<eos>``.

    Targets are the segments that say so, with the structure that a model must write around them: opener, dims and closer of a
    picture, the ``<end>`` of an assistant's turn, and ``<eos>``.

    Raises:
        TemplateError: a segment that the layout cannot hold.
        VocabError: ids that a tokenizer of the layout does not have.
    """
    writer = _Writer(layout)
    for piece in pieces:
        writer.piece(piece)
    writer.structure([Special.EOS], target=True)
    return writer.document()


def encode_prompt(layout: VocabLayout, pieces: Sequence[Piece], role: str | None = "assistant") -> Int[np.ndarray, " s"]:
    """Writes the start of a document that a model is to go on with.

    Args:
        layout: the model's vocabulary.
        pieces: what stands before.
        role: whose turn is opened at the end; None opens none.
    """
    writer = _Writer(layout)
    for piece in pieces:
        writer.piece(piece)
    if role is not None:
        writer.structure([ROLES[role]], target=False)
    return writer.document().tokens


def feature_places(grid: Sequence[int], merge: int = 1, queries: int = 0) -> tuple[int, ...]:
    """Grid of the ``<feature>`` tokens of a span, which a model's connector decides.

    Args:
        grid: of the vectors.
        merge: cells per side that the connector joins into one.
        queries: vectors that the connector makes of any grid; 0 where it goes by cells.
    """
    return (1, queries) if queries else tuple(-(-n // merge) for n in grid)


def text_segment(encode_text: EncodeText, text: str, target: bool) -> Segment:
    """Words as a segment."""
    return Segment(Modality.TEXT, torch.tensor(list(encode_text(text)), dtype=torch.int64), target=target)


def question_turn(encode_text: EncodeText, question: str, picture: Segment | None = None) -> Turn:
    """What a person says who asks about a picture; follow-up questions bring none."""
    words = text_segment(encode_text, question, target=False)
    return Turn("user", (replace(picture, target=False), words) if picture is not None else (words,))


def draw_turn(encode_text: EncodeText, caption: str) -> Turn:
    """What a person says who wants a picture."""
    return Turn("user", (text_segment(encode_text, f"draw {caption}", target=False),))


def say_turn(encode_text: EncodeText, words: str) -> Turn:
    """What a person says who wants words spoken."""
    return Turn("user", (text_segment(encode_text, f"say {words}", target=False),))


def read_turn(encode_text: EncodeText, words: str) -> Turn:
    """What a person says who wants words read aloud one by one."""
    return Turn("user", (text_segment(encode_text, f"read {words}", target=False),))


def vqa_prompt(layout: VocabLayout, encode_text: EncodeText, picture: Segment | None, question: str) -> Int[np.ndarray, " s"]:
    """Prompt for an answer, up to ``<assistant>``. Without a picture it is the control that sees only words."""
    return encode_prompt(layout, (question_turn(encode_text, question, picture),))


def draw_prompt(layout: VocabLayout, encode_text: EncodeText, caption: str) -> Int[np.ndarray, " s"]:
    """Prompt for a picture, up to ``<assistant>``; the model writes ``<boi>``, dims and codes."""
    return encode_prompt(layout, (draw_turn(encode_text, caption),))


def say_prompt(layout: VocabLayout, encode_text: EncodeText, words: str) -> Int[np.ndarray, " s"]:
    """Prompt for speech, up to ``<assistant>``; the model writes ``<boa>``, frames and ``<eoa>``."""
    return encode_prompt(layout, (say_turn(encode_text, words),))


def read_prompt(layout: VocabLayout, encode_text: EncodeText, words: str) -> Int[np.ndarray, " s"]:
    """Prompt for words by turns with their sounds, up to ``<assistant>``."""
    return encode_prompt(layout, (read_turn(encode_text, words),))


def caption_prompt(layout: VocabLayout, medium: Segment) -> Int[np.ndarray, " s"]:
    """Prompt for a caption: the medium alone; the model goes on with words, up to ``<eos>``."""
    return encode_prompt(layout, (replace(medium, target=False),), role=None)


@runtime_checkable
class Template(Protocol):
    """A task: what documents a sample becomes."""

    def __call__(self, sample: Sample, encode_text: EncodeText, questions_per_document: int = 1) -> list[Document]: ...


def plain(sample: Sample, encode_text: EncodeText, questions_per_document: int = 1) -> list[Document]:
    """The medium alone."""
    return [(replace(sample.medium, target=True),)]


def caption(sample: Sample, encode_text: EncodeText, questions_per_document: int = 1) -> list[Document]:
    """Medium, then its caption; only the caption is predicted. No caption, no document."""
    return [(replace(sample.medium, target=False), text_segment(encode_text, words, target=True)) for words in sample.captions]


def draw(sample: Sample, encode_text: EncodeText, questions_per_document: int = 1) -> list[Document]:
    """A person asks for the picture in words, the assistant draws it. No caption, no document."""
    return [(draw_turn(encode_text, words), Turn("assistant", (replace(sample.medium, target=True),))) for words in sample.captions]


def say(sample: Sample, encode_text: EncodeText, questions_per_document: int = 1) -> list[Document]:
    """A person asks to hear the words, the assistant says them. No caption, no document."""
    return [(say_turn(encode_text, words), Turn("assistant", (replace(sample.medium, target=True),))) for words in sample.captions]


def read(sample: Sample, encode_text: EncodeText, questions_per_document: int = 1) -> list[Document]:
    """A person asks to have the words read, the assistant writes each and then its sound, by turns: what a code sounds like stands right
    before it, and need not be found in the text (interleaving by words, Spirit LM, Nguyen et al., arXiv 2402.05755). No words, no document.
    """
    if not sample.words:
        return []
    frames = sample.medium.shape[0]
    ends = [first for _, first in sample.words[1:]] + [frames]
    if sample.words[0][1] or any(first >= end for (_, first), end in zip(sample.words, ends, strict=True)):
        raise TemplateError(f"words at frames {[first for _, first in sample.words]} of {frames}: they begin at 0 and go up")
    segments: list[Segment] = []
    for (word, first), end in zip(sample.words, ends, strict=True):
        assert sample.medium.ids is not None, "only codes are written"
        segments += [text_segment(encode_text, word, target=True), Segment(Modality.AUDIO, sample.medium.ids[:, first:end], target=True)]
    said = " ".join(word for word, _ in sample.words)
    return [(read_turn(encode_text, said), Turn("assistant", tuple(segments)))]


def vqa(sample: Sample, encode_text: EncodeText, questions_per_document: int = 1) -> list[Document]:
    """Questions about the picture, in order, ``questions_per_document`` to a document; only answers are predicted."""
    return _conversations(sample, sample.medium, encode_text, questions_per_document)


def vqa_blind(sample: Sample, encode_text: EncodeText, questions_per_document: int = 1) -> list[Document]:
    """As `vqa` without the picture. A model that has met a few of these knows how likely answers are by the words alone, so that the
    control which hides the picture measures just that; else the prompt is unlike any other, and the answer arbitrary.
    """
    return _conversations(sample, None, encode_text, questions_per_document)


def _conversations(sample: Sample, picture: Segment | None, encode_text: EncodeText, questions_per_document: int) -> list[Document]:
    if questions_per_document < 1:
        raise TemplateError(f"questions_per_document: at least 1 is wanted, {questions_per_document} given")
    documents: list[Document] = []
    for start in range(0, len(sample.questions), questions_per_document):
        turns = []
        for i, (question, answer) in enumerate(sample.questions[start : start + questions_per_document]):
            turns.append(question_turn(encode_text, question, picture if i == 0 else None))
            turns.append(Turn("assistant", (text_segment(encode_text, answer, target=True),)))
        documents.append(tuple(turns))
    return documents


TEMPLATES: dict[str, Template] = {
    "plain": plain,
    "caption": caption,
    "draw": draw,
    "say": say,
    "read": read,
    "vqa": vqa,
    "vqa-blind": vqa_blind,
}


class _Writer:
    """Collects runs of tokens; neighbouring text of the same purpose becomes one record."""

    def __init__(self, layout: VocabLayout) -> None:
        self.layout = layout
        self.runs: list[np.ndarray] = []
        self.records: list[SegmentRecord] = []
        self.features: list[Tensor] = []
        self.feature_grids: list[tuple[int, ...]] = []
        self.structure([Special.BOS], target=False)

    def document(self) -> EncodedDocument:
        features = torch.cat(self.features) if self.features else None
        grids = np.array(self.feature_grids) if self.features else None
        return EncodedDocument(np.concatenate(self.runs), tuple(self.records), features, grids)

    def piece(self, piece: Piece) -> None:
        if isinstance(piece, Segment):
            self.segment(piece)
            return
        self.structure([ROLES[piece.role]], target=False)
        for segment in piece.segments:
            self.segment(segment)
        self.structure([Special.END], target=piece.role == "assistant")

    def segment(self, segment: Segment) -> None:
        if segment.features is not None:
            self.feature_span(segment, segment.features)
        elif segment.ids is None:
            raise TemplateError(f"{segment.modality} segment: it has neither ids nor features")
        elif segment.modality is Modality.TEXT:
            self.text(self.layout.to_global(_numpy(segment.ids), Modality.TEXT), segment.target)
        else:
            self.code_span(segment, _numpy(segment.ids))

    def structure(self, ids: Sequence[int], target: bool) -> None:
        self.text(np.array(ids, dtype=np.int64), target)

    def text(self, ids: np.ndarray, target: bool) -> None:
        if len(ids) == 0:
            return
        last = self.records[-1] if self.records else None
        self.runs.append(ids)
        if last is not None and last.modality is Modality.TEXT and last.target == target:
            length = last.length + len(ids)
            self.records[-1] = SegmentRecord(Modality.TEXT, length, (length,), target)
        else:
            self.records.append(SegmentRecord(Modality.TEXT, len(ids), (len(ids),), target))

    def code_span(self, segment: Segment, codes: np.ndarray) -> None:
        modality, entry = segment.modality, self.layout.entry(segment.modality)
        num_codebooks, num_dims = len(entry.codebook_sizes), NUM_DIMS[modality]
        if codes.ndim != 1 + (num_dims or 1) or codes.shape[0] != num_codebooks or codes.size == 0:
            axes = num_dims or 1
            raise TemplateError(
                f"{modality} codes of shape {list(codes.shape)}: {num_codebooks} codebooks over {axes} axes of at least 1 are wanted"
            )
        flat = np.stack([self.layout.to_global(codes[k].reshape(-1), modality, k) for k in range(num_codebooks)])
        frame, codebook, _ = entry.pattern.order(flat.shape[1])
        dims = self.dims(modality, segment.shape) if num_dims else []
        self.structure([OPENERS[modality], *dims], segment.target)
        self.body(flat[codebook, frame], segment, segment.target)
        self.structure([CLOSERS[modality]], segment.target)

    def feature_span(self, segment: Segment, features: Tensor) -> None:
        entry = self.layout.continuous
        if entry is None or entry.modality is not segment.modality:
            raise TemplateError(f"{segment.modality} features: this vocabulary has no continuous {segment.modality} tokenizer")
        if len(segment.shape) != 2:
            raise TemplateError(f"{segment.modality} features of shape {list(features.shape)}: [h, w, d] is wanted")
        places = segment.places or segment.shape
        target = segment.target and entry.written
        self.structure([Special.BOF, *self.dims(segment.modality, places)], target)
        self.body(np.full(math.prod(places), Special.FEATURE, dtype=np.int64), segment, target)
        self.features.append(features.reshape(-1, features.shape[-1]))
        self.feature_grids.append(segment.shape)
        self.structure([Special.EOF], target)

    def body(self, ids: np.ndarray, segment: Segment, target: bool) -> None:
        self.runs.append(ids)
        self.records.append(SegmentRecord(segment.modality, len(ids), segment.shape, target))

    def dims(self, modality: Modality, shape: tuple[int, ...]) -> list[int]:
        longest = max(shape)
        if not min(shape) or longest > self.layout.max_dim:
            raise TemplateError(
                f"{modality} of {'x'.join(map(str, shape))} cells: this vocabulary's dims reach from 1 to {self.layout.max_dim}; "
                "crop or shrink it"
            )
        return [self.layout.dim(n) for n in shape]


def _numpy(ids: Tensor) -> np.ndarray:
    return ids.detach().cpu().numpy().astype(np.int64)
