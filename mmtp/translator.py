"""Between media and streams: what a vocabulary's tokenizers make of texts, pictures and sounds, and what they make of a stream again."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.models.connector import Connector
from mmtp.speaking import joined
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.vocab import VocabLayout
from mmtp.tokenizers.continuous.base import plane
from mmtp.types import Codes, Latents, MmtpError, Modality, Segment, grid_coordinates

Picture = Float[Tensor, "3 _ _"]
Sound = Float[Tensor, "c _"]


class TranslationError(MmtpError):
    """A medium that there is no tokenizer for."""


class Translator:
    """The tokenizers of a vocabulary.

    Args:
        layout: the vocabulary.
        tokenizers: by the names that it gives them.
        connector: how vectors become a model's, which says how many there are.

    Raises:
        VocabMismatch: a tokenizer is not the one that the vocabulary was made with.
    """

    def __init__(self, layout: VocabLayout, tokenizers: Mapping[str, Any], connector: Connector.Config) -> None:
        self.layout, self.tokenizers, self.connector = layout, tokenizers, connector
        self.grammar = StreamGrammar(layout)
        delays = {e.name: e.delays for e in self.layout.media}
        residual = {name for name, tokenizer in tokenizers.items() if tokenizer.spec.residual}
        codebooks = {e.name: len(e.codebook_sizes) for e in self.layout.media if e.name in residual}
        found = VocabLayout.of(tokenizers, self.layout.max_dim, delays, any(e.written for e in self.layout.media), codebooks)
        self.layout.check_same(found, "the tokenizers given")

    def tokenizer(self, modality: Modality, continuous: bool = False) -> Any:
        """The model's tokenizer of a medium, the one that gives codes or the one that gives vectors.

        Raises:
            TranslationError: there is none.
        """
        for tokenizer in self.tokenizers.values():
            if tokenizer.spec.modality is modality and bool(tokenizer.spec.latent_dim) == continuous:
                return tokenizer
        raise TranslationError(f"this model has no {modality} tokenizer; it has {', '.join(self.tokenizers)}")

    def encode_text(self, text: str) -> list[int]:
        """Local ids of a text."""
        return self.tokenizer(Modality.TEXT).encode_text(text)

    def encode_pictures(self, pictures: Sequence[Picture]) -> list[Segment]:
        """Pictures as segments, in order: of vectors where the model has a continuous tokenizer of pictures, else of codes."""
        return self._encode(Modality.IMAGE, pictures)

    def encode_sounds(self, sounds: Sequence[Sound]) -> list[Segment]:
        """Sounds, at the rate and with the channels of the model's tokenizer, as segments, in order: of vectors where that tokenizer is
        continuous, else of codes.
        """
        return self._encode(Modality.AUDIO, sounds)

    def pictures(self, tokens: Sequence[int] | Int[np.ndarray, " s"], start: int = 0) -> list[Picture]:
        """All finished pictures of a stream, decoded; arguments and errors are those of :meth:`segments`."""
        return self.decode(self.segments(tokens, start))

    def sounds(self, tokens: Sequence[int] | Int[np.ndarray, " s"], start: int = 0, as_one: bool = False) -> list[Sound]:
        """All finished sounds of a stream, decoded; likewise. As one, their codes are joined before, as those of words that are read."""
        found = self.segments(tokens, start, Modality.AUDIO)
        whole = joined(found) if as_one else None
        return self.decode(found if whole is None else [whole])

    def segments(self, tokens: Sequence[int] | Int[np.ndarray, " s"], start: int = 0, modality: Modality = Modality.IMAGE) -> list[Segment]:
        """Codes of all finished spans of a medium in a stream.

        Args:
            tokens: a document, or the start of one.
            start: leave out what begins before this offset.
            modality: which medium.

        Raises:
            GrammarError: the stream breaks the grammar; names the offset.
        """
        array = np.asarray(tokens, dtype=np.int64)
        spans = [span for span in self.grammar.spans(array) if span.modality is modality and not span.continuous and span.start >= start]
        return [Segment(modality, torch.from_numpy(self.grammar.codes(array, span))) for span in spans]

    def text_ids(self, text: str) -> list[int]:
        """Vocabulary ids of a text."""
        return self.layout.to_global(np.array(self.encode_text(text), dtype=np.int64), Modality.TEXT).tolist()

    def decode(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Media of codes of one modality, in order; those of vectors after them."""
        codes = [Codes(s.ids.unsqueeze(0), torch.tensor([s.shape])) for s in segments if s.ids is not None]
        decoded = list(self.tokenizer(segments[0].modality).decode(Codes.stack(codes))) if codes else []
        vectors = [segment.features for segment in segments if segment.features is not None]
        if vectors:
            latents = Latents.pad([v.flatten(0, 1) for v in vectors], [grid_coordinates(v.shape[:2]) for v in vectors])
            decoded += self.tokenizer(segments[0].modality, continuous=True).decode(latents)
        return decoded

    def _encode(self, modality: Modality, media: Sequence[Tensor]) -> list[Segment]:
        """Media as segments, in order."""
        if not media:
            return []
        continuous = any(entry.continuous and entry.modality is modality for entry in self.layout.media)
        tokenizer = self.tokenizer(modality, continuous)
        encoded = tokenizer.encode(list(media))
        if isinstance(encoded, Codes):
            kept = len(self.layout.entry(modality).codebook_sizes)  # of a residual tokenizer a model may know the first few alone
            return [Segment(modality, encoded.item(i)[:kept]) for i in range(len(encoded))]
        segments = []
        for i in range(len(encoded)):
            features = plane(encoded, i, tokenizer.spec.latent_dim).permute(1, 2, 0)
            segments.append(Segment(modality, features=features, places=self.connector.places(features.shape[:2])))
        return segments

    def encode_once(self, pictures: Sequence[Picture | Segment | None]) -> list[Segment | None]:
        """Codes of every picture; one that is asked about several times is encoded once."""
        distinct = {id(p): p for p in pictures if isinstance(p, Tensor)}
        coded = dict(zip(distinct, self.encode_pictures(list(distinct.values())) if distinct else [], strict=True))
        return [coded[id(p)] if isinstance(p, Tensor) else p for p in pictures]
