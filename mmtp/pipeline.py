"""Text, pictures and sound in and out: the only place where tokenizers meet a model."""

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.decode.batcher import Piece
from mmtp.decode.constrain import Constrainer, Constraint, Form, check_form
from mmtp.decode.drafts import Drafts
from mmtp.decode.engine import Engine, Request
from mmtp.decode.sample import Sampling
from mmtp.decode.stats import Generation
from mmtp.events import Events, Reader
from mmtp.hub import from_pretrained
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.speaking import joined, parts, read_words
from mmtp.stream.packing import collate
from mmtp.stream.template import (
    TEMPLATES,
    Sample,
    Turn,
    caption_prompt,
    draw_prompt,
    encode_document,
    encode_prompt,
    read_prompt,
    say_prompt,
    text_segment,
    vqa_prompt,
)
from mmtp.stream.vocab import Special, VocabMismatch
from mmtp.tokenizers.matching import by_fingerprint, loaded
from mmtp.translator import Picture, Sound, Translator
from mmtp.types import MmtpError, Modality, Segment


class PipelineError(MmtpError):
    """A request that the model or its tokenizers cannot serve."""


class Pipeline(Translator):
    """A model with the tokenizers that its vocabulary names.

    Args:
        model: in evaluation mode.
        tokenizers: by the names that the model's vocabulary gives them.
        exact: make speculative output equal plain output bit for bit (see :class:`mmtp.decode.engine.Engine`).
        drafts: where drafts come from; see the engine.
        draft_cost: what a draft costs, which says how many are made; likewise.
        cache: what keys and values are held in; likewise.
        compile: runs passes by compiled kernels; likewise.
        device: where the model runs, as torch names it; None leaves it where it is. Tokenizers stay where they are.
        precision: of weights and what they multiply, ``"float32"`` or ``"bfloat16"``; None leaves weights as they are.

    Raises:
        VocabMismatch: a tokenizer is not the one the model was trained with.
    """

    def __init__(
        self,
        model: UnifiedModel,
        tokenizers: dict[str, Any],
        *,
        exact: bool = False,
        drafts: Drafts | None = None,
        draft_cost: float | None = None,
        cache: str | None = None,
        compile: bool | None = False,
        device: torch.device | str | None = None,
        precision: Literal["float32", "bfloat16"] | None = None,
    ) -> None:
        self.model = model.eval().to(device, None if precision is None else getattr(torch, precision))
        super().__init__(model.config.layout, tokenizers, model.config.connector)
        self.engine = Engine(model, exact=exact, drafts=drafts, draft_cost=draft_cost, cache=cache, compile=compile)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        tokenizers: Mapping[str, Any] | Iterable[str | Path] | None = None,
        exact: bool = False,
        drafts: Drafts | None = None,
        draft_cost: float | None = None,
        cache: str | None = None,
        compile: bool | None = False,
        device: torch.device | str | None = None,
        precision: Literal["float32", "bfloat16"] | None = None,
    ) -> "Pipeline":
        """Loads a model and the tokenizers that it names.

        Args:
            name: zoo entry, folder or Hub id of a model.
            tokenizers: objects, or names and folders to load, for the names in the vocabulary; or names and folders alone, each of which
                serves what has its fingerprint. What is missing is looked for in the zoo.
            exact: see the class.
            drafts: likewise.
            draft_cost: likewise.
            cache: likewise.
            compile: likewise.
            device: likewise.
            precision: likewise.

        Raises:
            HubError: something is not found.
            PipelineError: what is given serves nothing in the vocabulary.
            VocabMismatch: a tokenizer differs from the one the model was trained with.
        """
        model = from_pretrained(name)
        if not isinstance(model, UnifiedModel):
            raise PipelineError(f"{name}: is a {type(model).__name__}, not a unified model; load it with mmtp.load")
        entries = ([model.config.layout.text] if model.config.layout.text else []) + list(model.config.layout.media)
        given, strangers = (tokenizers, {}) if isinstance(tokenizers, Mapping) else by_fingerprint(entries, tokenizers or ())
        for stranger, what in strangers.items():
            wanted = ", ".join(f"{entry.name} ({entry.fingerprint})" for entry in entries)
            raise PipelineError(f"tokenizer {stranger}: {what}; {name} was trained with {wanted}")
        built = {entry.name: loaded(name, entry.name, given.get(entry.name)) for entry in entries}
        try:
            return cls(
                model,
                built,
                exact=exact,
                drafts=drafts,
                draft_cost=draft_cost,
                cache=cache,
                compile=compile,
                device=device,
                precision=precision,
            )
        except VocabMismatch as error:
            raise VocabMismatch(f"{name}: {error}; the model needs the tokenizers it was trained with") from error

    def vqa_prompt(self, picture: Segment | None, question: str) -> list[int]:
        """Stream up to where the answer begins."""
        return vqa_prompt(self.layout, self.encode_text, picture, question).tolist()

    def draw_prompt(self, caption: str) -> list[int]:
        """Stream up to where the assistant begins; it writes ``<boi>``, dims and codes itself."""
        return draw_prompt(self.layout, self.encode_text, caption).tolist()

    @cached_property
    def constrainer(self) -> Constrainer:
        """Compiles constraints for this model's text.

        Raises:
            PipelineError: the model has no text tokenizer.
            ConstraintError: llguidance is not installed.
        """
        words = self.tokenizer(Modality.TEXT)
        return Constrainer(self.layout, words.token_bytes, words.encode_bytes)

    def constraint(self, **form: Unpack[Form]) -> Constraint | None:
        """What :meth:`reply` and its like hold an answer to; None where no form is given. Compile once what many requests share.

        Raises:
            PipelineError: several forms are given.
            ConstraintError: the form cannot be met.
        """
        if len(form) > 1:
            raise PipelineError(f"{' and '.join(form)} are given; an answer takes one form")
        return next((getattr(self.constrainer, name)(value) for name, value in form.items()), None)

    def answer(
        self,
        pictures: Sequence[Picture | Segment | None],
        questions: Sequence[str],
        *,
        batch_size: int = 64,
        max_new_tokens: int = 16,
        **form: Unpack[Form],
    ) -> list[str]:
        """Answers each question about its picture, greedily.

        Args:
            pictures: pictures, or codes from :meth:`encode_pictures`; None asks without one.
            questions: as many.
            batch_size: rows decoded at a time.
            max_new_tokens: limit of an answer.
            form: what the answers must look like, such as ``choices=["yes", "no"]``.

        Raises:
            ConstraintError: the form cannot be met, or an answer did not get it within the limit; names the question.
        """
        constraint = self.constraint(**form)
        segments = self.encode_once(pictures)
        prompts = [self.vqa_prompt(s, q) for s, q in zip(segments, questions, strict=True)]
        vectors = [self._vectors([s] if s is not None else []) for s in segments]
        # Plain: answers of one word have nothing to draft.
        asked = self._greedy(prompts, vectors, max_new_tokens, constraint, batch_size, stop=(Special.END,))
        for generation, question in zip(asked, questions, strict=True):
            check_form(generation, constraint, repr(question))
        return [self.text(generation) for generation in asked]

    def caption(
        self, media: Sequence[Picture | Segment], *, batch_size: int = 64, max_new_tokens: int = 512, **form: Unpack[Form]
    ) -> list[str]:
        """What the model says each picture shows or, given sounds as segments, what is said in each; greedily.

        Args:
            media: pictures, or codes from :meth:`encode_pictures` or :meth:`encode_sounds`.
            batch_size: rows decoded at a time.
            max_new_tokens: limit of a caption.
            form: what the captions must look like, as in :meth:`answer`, with its errors.
        """
        constraint = self.constraint(**form)
        segments = [segment for segment in self.encode_once(media) if segment is not None]
        prompts = [caption_prompt(self.layout, segment).tolist() for segment in segments]
        said = self._greedy(prompts, [self._vectors([segment]) for segment in segments], max_new_tokens, constraint, batch_size)
        for i, generation in enumerate(said):
            check_form(generation, constraint, f"caption {i}")
        return [self.text(generation) for generation in said]

    def draw(
        self,
        captions: Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        guidance: float = 1.0,
        guidance_end: float | None = None,
        per_modality: Mapping[str, Mapping[str, Any]] | None = None,
        verification: str = "coupling",
        speculative: bool = True,
        max_new_tokens: int = 4352,
        batch_size: int = 24,
        candidates: int = 1,
    ) -> list[Picture]:
        """Draws a picture per caption.

        Args:
            captions: what to draw; the person's words are "draw" and the caption.
            seeds: of the draws; 0, 1, 2, … where none are given.
            temperature: of sampling; 0 takes the most probable code every time.
            top_k: sample among so many of the most probable codes; 0 among all.
            top_p: sample among the most probable codes that make up this share.
            min_p: sample among codes at least so many times as probable as the most probable one.
            guidance: scale of classifier-free guidance; above 1 the words weigh more, 1 is off. It doubles the work of a pass.
            guidance_end: scale at the last code, to which it goes in equal steps; None keeps it.
            per_modality: settings for one medium, as of :class:`mmtp.decode.sample.Sampling`. Opener and dims of a picture are text.
            verification: how drafts are judged, likewise.
            speculative: several codes per pass; the output is the same, with ``rejection`` its distribution.
            max_new_tokens: limit of a drawing.
            batch_size: drawings decoded at a time.
            candidates: draw so many of each caption and keep the one in which the model itself best reads the caption
                (:meth:`caption_scores`). Seeds of different drawings share no candidate.

        Raises:
            PipelineError: the model ended its turn without a picture, or the limit cut it off; names the caption.
        """
        seeds = seeds or range(len(captions))
        base = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, guidance=guidance, guidance_end=guidance_end,
            per_modality=per_modality or {}, verification=verification,
        )  # fmt: skip
        samplings = [replace(base, seed=seed) for seed in seeds]
        drawn: list[Picture] = []
        for picture, caption, seed in zip(
            self.try_draw(
                captions,
                samplings,
                speculative=speculative,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                candidates=candidates,
            ),
            captions,
            seeds,
            strict=True,
        ):
            if picture is None:
                raise PipelineError(f"{caption!r}: no picture was drawn with seed {seed} within {max_new_tokens} tokens")
            drawn.append(picture)
        return drawn

    def try_draw(
        self,
        captions: Sequence[str],
        samplings: Sequence[Sampling],
        *,
        speculative: bool = True,
        max_new_tokens: int = 4352,
        batch_size: int = 24,
        candidates: int = 1,
    ) -> list[Picture | None]:
        """As :meth:`draw`; None where the model ended its turn without a picture or the limit cut it off."""

        def write(asked: Sequence[str], samplings: Sequence[Sampling]) -> list[Segment | None]:
            prompts = [self.draw_prompt(caption) for caption in asked]
            return self._write(Modality.IMAGE, prompts, samplings, speculative, max_new_tokens, batch_size)

        chosen = self._best_of(write, captions, samplings, candidates)
        decoded = iter(self.decode([codes for codes in chosen if codes is not None]))
        return [None if codes is None else next(decoded) for codes in chosen]

    def say(
        self,
        texts: Sequence[str],
        samplings: Sequence[Sampling] | None = None,
        *,
        speculative: bool = True,
        max_new_tokens: int = 4096,
        batch_size: int = 8,
        candidates: int = 1,
        at_once: int = 0,
        word_by_word: bool = False,
    ) -> list[Sound | None]:
        """Speaks texts; None where the model ended its turn without a sound or the limit cut it off.

        Args:
            texts: what to say; the person's words are "say" and the text.
            samplings: how codes are chosen; at temperature 1 with seeds 0, 1, 2, … where none are given.
            speculative: several codes per pass; the output is the same.
            max_new_tokens: limit of a sound.
            batch_size: sounds decoded at a time.
            candidates: say each text so many times and keep the sound in which the model itself best hears it (:meth:`caption_scores`).
            at_once: words said at once, at most; the codes of a text's parts are joined before they are decoded, and candidates are
                chosen part by part. 0 says each text as a whole. For models of short recordings, which lose the thread of long texts.
            word_by_word: write each word before its sound, by turns, as models do that have learnt the task ``read``; none is left out
                then, and none repeated.

        Raises:
            SpeakingError: ``at_once`` is below 0.
        """
        self.tokenizer(Modality.AUDIO)
        samplings = samplings or [Sampling(seed=seed) for seed in range(len(texts))]
        cut = [parts(text, at_once) for text in texts]
        said = [part for some in cut for part in some]
        tries = [replace(s, seed=s.seed * len(some) + i) for s, some in zip(samplings, cut, strict=True) for i in range(len(some))]

        def write(asked: Sequence[str], samplings: Sequence[Sampling]) -> list[Segment | None]:
            if not word_by_word:
                prompts = [say_prompt(self.layout, self.encode_text, part).tolist() for part in asked]
                return self._write(Modality.AUDIO, prompts, samplings, speculative, max_new_tokens, batch_size)
            prompts = [read_prompt(self.layout, self.encode_text, part).tolist() for part in asked]
            words = [[self.text_ids(word) for word in part.split()] for part in asked]
            streams = read_words(
                self.engine, prompts, words, samplings, speculative=speculative, max_new_tokens=max_new_tokens,
                max_lanes=batch_size * (1 + any(sampling.guided for sampling in samplings)),
            )  # fmt: skip
            return [None if stream is None else joined(self.segments(stream, modality=Modality.AUDIO)) for stream in streams]

        spoken = iter(self._best_of(write, said, tries, candidates))
        whole = [joined([next(spoken) for _ in some]) for some in cut]
        sounds = iter(self.decode([codes for codes in whole if codes is not None]))
        return [None if codes is None else next(sounds) for codes in whole]

    def caption_scores(self, media: Sequence[Picture | Segment], captions: Sequence[str]) -> list[float]:
        """How well the model reads each caption in its picture, or hears it in its sound: log-likelihood of the caption's tokens, in nats.

        The caption score of CogView's self-reranking (arXiv 2105.13290, section 3.3). It needs a model that was trained on captions.
        """
        scores = []
        for segment, words in zip(self.encode_once(media), captions, strict=True):
            assert segment is not None, "only questions go without a picture"
            (document,) = TEMPLATES["caption"](Sample(segment, (words,)), self.encode_text)
            encoded = encode_document(self.layout, document)
            with torch.no_grad():
                written = (encoded.tokens, encoded.target_mask, encoded.features, encoded.feature_grids)
                batch = collate([written], self.grammar, len(encoded.tokens)).to(self.engine.device)
                scores.append(-self.model.loss(batch, LossConfig()).sums[Modality.TEXT, 0])
        return scores

    def request(
        self,
        words: str,
        pictures: Sequence[Picture] = (),
        sounds: Sequence[Sound] = (),
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 4352,
        **form: Unpack[Form],
    ) -> Request:
        """What :meth:`reply` asks of the engine: a person's turn, of pictures, sounds, then words, and what may follow; with its errors."""
        constraint = self.constraint(**form)
        media = self.encode_pictures(pictures) + self.encode_sounds(sounds)
        turn = Turn("user", (*media, text_segment(self.encode_text, words, target=False)))
        return Request(
            prefix=encode_prompt(self.layout, (turn,)).tolist(), sampling=sampling or Sampling(), max_new_tokens=max_new_tokens,
            stop=(Special.END,), vectors=self._vectors(media), constraint=constraint,
        )  # fmt: skip

    def reply(
        self,
        words: str,
        pictures: Sequence[Picture] = (),
        sounds: Sequence[Sound] = (),
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 4352,
        speculative: bool = True,
        **form: Unpack[Form],
    ) -> Generation:
        """The assistant's turn after a person's: pictures, sounds, then words. What it holds, :meth:`text`, :meth:`pictures` and
        :meth:`sounds` tell.

        With a form (``json_schema=…``, ``regex=…``, ``choices=…``) the turn is text of that form; where the limit ended it before,
        ``cut`` is set and what there is lacks its end.

        Raises:
            TemplateError: a picture is larger than the vocabulary can say.
            ConstraintError: the form cannot be met.
        """
        asked = self.request(words, pictures, sounds, sampling=sampling, max_new_tokens=max_new_tokens, **form)
        return self.engine.generate(
            asked.prefix, asked.sampling, max_new_tokens, speculative, asked.stop, asked.vectors, asked.constraint
        )  # fmt: skip

    def stream(
        self,
        words: str,
        pictures: Sequence[Picture] = (),
        sounds: Sequence[Sound] = (),
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 4352,
        speculative: bool = True,
        **form: Unpack[Form],
    ) -> Events:
        """As :meth:`reply`, event by event as it settles (:mod:`mmtp.events`). Errors come at once, and closing ends the request."""
        asked = self.request(words, pictures, sounds, sampling=sampling, max_new_tokens=max_new_tokens, **form)
        return self.events(self.engine.stream(asked, speculative=speculative))

    def events(self, pieces: Generator[Piece]) -> Events:
        """What the pieces of a row hold; the rows of several requests run beside each other in one batch (:meth:`Engine.batcher`)."""
        return Events(pieces, Reader(self.grammar, self.tokenizers, lambda segment: self.decode([segment])[0]))

    def text(self, generation: Generation) -> str:
        """The words among the new tokens."""
        ids = self.layout.text_ids(np.array(generation.new_tokens, dtype=np.int64))
        return self.tokenizer(Modality.TEXT).decode_text(ids.tolist())

    def drawn(self, generation: Generation) -> list[Picture]:
        """All finished pictures among the new tokens, decoded."""
        return self.decode(self.written(generation))

    def written(self, generation: Generation, modality: Modality = Modality.IMAGE) -> list[Segment]:
        """Codes or vectors of all finished spans of a medium among the new tokens."""
        written, start = self.segments(generation.tokens, generation.prompt_length, modality), 0
        for span in self.grammar.spans(np.array(generation.tokens)):
            if span.continuous and span.start >= generation.prompt_length and generation.vectors is not None:
                end = start + math.prod(span.grid)
                written.append(Segment(span.modality, features=generation.vectors[start:end].reshape(*span.grid, -1).cpu()))
                start = end
        return [segment for segment in written if segment.modality is modality]

    def _greedy(
        self,
        prompts: Sequence[list[int]],
        vectors: Sequence[Float[Tensor, "_ d"] | None],
        max_new_tokens: int,
        constraint: Constraint | None,
        batch_size: int,
        stop: Sequence[int] = (),
    ) -> list[Generation]:
        """Most probable texts of one form; drafts where they cost little: not where a head would make them."""
        refines = self.model.refiner is not None and Modality.TEXT in self.model.refiner.media
        cheap = constraint is not None or refines or self.model.ngrams is not None
        return self.engine.generate_batch(
            prompts, [Sampling(temperature=0.0)] * len(prompts), max_new_tokens, speculative=cheap, stop=stop,
            vectors=vectors, constraints=[constraint] * len(prompts), max_lanes=batch_size,
        )  # fmt: skip

    def _best_of(
        self,
        write: Callable[[Sequence[str], Sequence[Sampling]], list[Segment | None]],
        captions: Sequence[str],
        samplings: Sequence[Sampling],
        candidates: int,
    ) -> list[Segment | None]:
        """Of several candidates for every caption that in which the model best reads it; ``write`` makes them."""
        if candidates < 1:
            raise PipelineError(f"candidates {candidates}: at least 1 is wanted")
        asked = [caption for caption in captions for _ in range(candidates)]
        tries = [replace(s, seed=s.seed * candidates + i) for s in samplings for i in range(candidates)]
        written = write(asked, tries)
        groups = [written[start : start + candidates] for start in range(0, len(written), candidates)]
        return [self._best(group, caption) for group, caption in zip(groups, captions, strict=True)]

    def _write(
        self,
        modality: Modality,
        prompts: Sequence[list[int]],
        samplings: Sequence[Sampling],
        speculative: bool,
        max_new_tokens: int,
        batch_size: int,
    ) -> list[Segment | None]:
        """Codes of the first span of a medium in every reply; None where there is none."""
        lanes = batch_size * (1 + any(sampling.guided for sampling in samplings))
        replies = self.engine.generate_batch(prompts, samplings, max_new_tokens, speculative, stop=(Special.END,), max_lanes=lanes)
        return [next(iter(self.written(reply, modality)), None) for reply in replies]

    def _best(self, written: Sequence[Segment | None], caption: str) -> Segment | None:
        """That in which the model best reads the caption."""
        finished = [codes for codes in written if codes is not None]
        if len(finished) < 2:
            return finished[0] if finished else None
        scores = self.caption_scores(finished, [caption] * len(finished))
        return finished[scores.index(max(scores))]

    @torch.no_grad()
    def _vectors(self, segments: Sequence[Segment]) -> Float[Tensor, "n d"] | None:
        """What the model reads at the ``<feature>`` tokens of some segments; None where these have codes."""
        features = [(s.features.to(self.engine.device), torch.tensor([s.shape])) for s in segments if s.features is not None]
        return torch.cat([self.model.embedding.connect(f.flatten(0, 1), grid) for f, grid in features]) if features else None
