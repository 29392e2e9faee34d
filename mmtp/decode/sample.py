"""Choosing a token: temperature, top-k, top-p, and noise that is a pure function of (seed, place in the stream).

A sample from ``softmax(l)`` is ``argmax(l + G)`` with Gumbel noise G (Gumbel 1954; Maddison et al. 2014, eq. 4). When the noise of
a place depends on nothing but the seed and the place, drafts can be drawn with the very noise that the target will meet there:
a good draft is then accepted often, and what comes out is the sequence that plain sampling with that seed gives, token for token.
That is verification by *coupling*.

Verification by *rejection* (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1) draws drafts with noise of their own and accepts
x ~ q with probability min(1, p(x) / q(x)); in place of one refused it samples from norm(max(p - q, 0)). The output is distributed as
that of plain sampling, but it is another sample. It accepts with probability 1 - TV(p, q), the most there can be; coupling with
somewhat less. For that to hold, nothing that leads to q may depend on the noise that judges the draft, nor on that which draws it:
a head's cache may hold traces of drafts that were refused, so their noise is never used twice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmtp.types import MmtpError, Modality

VERIFICATIONS = ("coupling", "rejection")


class SamplingError(MmtpError):
    """Sampling settings outside their range."""


PER_MODALITY = ("temperature", "top_k", "top_p", "min_p", "guidance", "guidance_end")
"""Settings that may differ between media."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token. Of vectors it scales the noise that they are made of.
        top_k: keep the k most probable; 0 keeps all.
        top_p: keep the most probable until their sum reaches p (Holtzman et al. 2020, section 3.1); 1 keeps all.
        min_p: keep what is at least so many times as probable as the most probable (Nguyen et al., arXiv 2407.01082, section 3);
            0 keeps all.
        guidance: scale w of classifier-free guidance inside pictures, sounds and videos: logits become ``u + w (c - u)``, where c
            knows the prompt and u the span alone (Ho & Salimans, arXiv 2207.12598, eq. 6 with w - 1 for their w). 1 guides nothing.
        guidance_end: scale at the last cell of a picture or video, to which it goes in equal steps from ``guidance`` at the first; None
            keeps it as it is. Sounds, whose length shows only at their end, have ``guidance`` throughout.
        repetition_penalty: at places of text, divides logits above 0 of the text tokens that stand in the stream so far, prompt
            included, and multiplies those below (Keskar et al., arXiv 1909.05858, section 4.1); 1 changes nothing.
        seed: decides the noise; equal seeds give equal streams.
        verification: how drafts are judged: ``coupling`` gives the very tokens of plain decoding, ``rejection`` tokens of the same
            distribution and a little sooner. They differ with drafts and at temperatures above 0 alone.
        per_modality: medium of the token -> settings of ``PER_MODALITY`` that are its own. Guidance goes by the medium of the span.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0
    guidance_end: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    verification: str = "coupling"
    per_modality: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise SamplingError(f"temperature {self.temperature}: a number from 0 up is wanted")
        if self.top_k < 0:
            raise SamplingError(f"top_k {self.top_k}: 0 (all) or a number of tokens is wanted")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p {self.top_p}: a number above 0 and up to 1 is wanted")
        if not 0 <= self.min_p <= 1:
            raise SamplingError(f"min_p {self.min_p}: a number from 0 to 1 is wanted")
        for name, weight in (("guidance", self.guidance), ("guidance_end", self.guidance_end)):
            if weight is not None and not 0 <= weight < float("inf"):
                raise SamplingError(f"{name} {weight}: a number from 0 up is wanted; 1 guides nothing")
        if not 0 < self.repetition_penalty < float("inf"):
            raise SamplingError(f"repetition_penalty {self.repetition_penalty}: a number above 0 is wanted; 1 changes nothing")
        if not 0 <= self.seed < 2**64:
            raise SamplingError(f"seed {self.seed}: a number from 0 to 2^64 - 1 is wanted")
        if self.verification not in VERIFICATIONS:
            raise SamplingError(f"verification {self.verification!r}: one of {', '.join(VERIFICATIONS)} is wanted")
        for modality, settings in self.per_modality.items():
            if modality not in set(Modality):
                raise SamplingError(f"per_modality {modality!r}: one of {', '.join(Modality)} is wanted")
            if unknown := [name for name in settings if name not in PER_MODALITY]:
                raise SamplingError(f"{modality}: {unknown[0]!r} is not set per medium; {', '.join(PER_MODALITY)} are")
            try:
                self.of(modality)
            except SamplingError as error:
                raise SamplingError(f"{modality}: {error}") from None

    def of(self, modality: str) -> "Sampling":
        """The settings of one medium."""
        return self._of.get(modality, self)

    @cached_property
    def _of(self) -> dict[str, "Sampling"]:
        return {modality: replace(self, per_modality={}, **settings) for modality, settings in self.per_modality.items()}

    def weight(self, progress: float) -> float:
        """Scale of guidance so far into a span, 0 to 1."""
        end = self.guidance if self.guidance_end is None else self.guidance_end
        return self.guidance + (end - self.guidance) * progress

    @property
    def guided(self) -> bool:
        """Whether any place is guided."""
        return any({s.guidance, s.weight(1.0)} != {1} for s in (self, *self._of.values()))

    @property
    def rejects(self) -> bool:
        """Whether drafts are judged by rejection sampling; at temperature 0 both ways are one."""
        return self.verification == "rejection" and self.temperature > 0


class Draft(NamedTuple):
    """A proposed token.

    Attributes:
        token: vocabulary id, or id among the legal ones, as the holder has it.
        probabilities: q, of which it is a sample, over the legal ids of its slot; None where it was the only one that could have come.
    """

    token: int
    probabilities: Float[Tensor, " n"] | None = None


class Noise:
    """Noise by place in the stream. Gumbel noise of places that were drafted in vain is drawn once and kept until they are passed.

    Args:
        seed: of the request.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._kept: dict[int, Float[Tensor, " n"]] = {}
        self._generator = _Generator(seed)

    def at(self, place: int, size: int) -> Float[Tensor, " n"]:
        """Noise over ``size`` legal ids at a place."""
        kept = self._kept.get(place)
        if kept is None or kept.shape[0] != size:
            kept = self._kept[place] = _gumbel(self._generator.at(0, place), size)
        return kept

    def of_draft(self, place: int, begun: int, size: int) -> Float[Tensor, " n"]:
        """Noise of a draft that rejection will judge.

        Args:
            place: that of the draft.
            begun: length of the stream when it was made, so that a place drafted again meets other noise.
            size: number of legal ids.
        """
        return _gumbel(self._generator.at(2, place, begun), size)

    def uniform(self, place: int) -> float:
        """A number from 0 to below 1 that judges the draft at a place."""
        return self._generator.at(3, place).random()

    def forget_before(self, place: int) -> None:
        """Drops what will not be asked for again."""
        for passed in [p for p in self._kept if p < place]:
            del self._kept[passed]


def gaussian(seed: int, place: int, size: int) -> Float[Tensor, " n"]:
    """Normal noise that the vector at a place is made of."""
    return torch.from_numpy(_Generator(seed).at(1, place).standard_normal(size, dtype=np.float32))


class _Generator:
    """Independent streams of random numbers, by what they are for and where: ``Philox(key=seed, counter=(0, begun, use, place))``."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)
        self._numbers = np.random.Generator(self._bits)
        self._start = self._bits.state

    def at(self, use: int, place: int, begun: int = 0) -> np.random.Generator:
        """The beginning of a stream. It holds up to the next call: a generator made anew costs as much as a small product."""
        self._start["state"]["counter"][:] = (0, begun, use, place)
        self._bits.state = self._start
        return self._numbers


def _gumbel(generator: np.random.Generator, size: int) -> Float[Tensor, " n"]:
    # -log(E) of an exponential E is Gumbel; E is drawn in float32 and is never 0 after the clip.
    exponential = generator.standard_exponential(size, dtype=np.float32)
    return torch.from_numpy(-np.log(np.maximum(exponential, np.float32(1e-38))))


def warp(logits: Float[Tensor, "m n"], sampling: Sampling) -> Float[Tensor, "m n"]:
    """Logits after temperature, top-k, top-p and min-p; what is cut away is -inf. Temperature 0 leaves them as they are."""
    if sampling.temperature == 0:
        return logits
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        probabilities = ordered.softmax(1)
        # The token that crosses p stays, so at least one always does.
        beyond = probabilities.cumsum(1) - probabilities >= sampling.top_p
        logits = logits.scatter(1, order, ordered.masked_fill(beyond, float("-inf")))
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(1, keepdim=True) + math.log(sampling.min_p), float("-inf"))
    return logits


def penalize(logits: Float[Tensor, "m n"], seen: Bool[Tensor, "m n"], penalty: float) -> Float[Tensor, "m n"]:
    """Logits of text after the penalty on what stands in the stream already."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(
    logits: Float[Tensor, "m n"], sampling: Sampling, noise: Noise, places: Sequence[int], drafts: Sequence[Draft | None] | None = None
) -> list[int]:
    """One token per row of logits, as local ids.

    Args:
        logits: over the legal ids of one slot, one row per place.
        sampling: settings of the request.
        noise: of the request.
        places: places in the stream, one per row.
        drafts: what was proposed there, as local ids; only rejection sampling looks at it. A token other than the draft refuses it.
    """
    scores = warp(logits.float(), sampling)
    if sampling.rejects:
        drafted = {i: draft for i, draft in enumerate(drafts or ()) if draft is not None}
        if drafted:
            uniforms = [noise.uniform(places[i]) for i in drafted]
            at = torch.tensor(list(drafted), device=scores.device)
            scores = scores.index_copy(0, at, judge(scores[at].softmax(1), list(drafted.values()), uniforms).log())
    if sampling.temperature > 0:
        scores = scores + _stacked([noise.at(place, scores.shape[1]) for place in places]).to(scores.device)
    return _argmax(scores)


def judge(p: Float[Tensor, "m n"], drafts: Sequence[Draft], uniforms: Sequence[float]) -> Float[Tensor, "m n"]:
    """Weights by which the tokens at drafted places are chosen: the draft alone where it is accepted, else the residual.

    Leviathan et al. 2023, algorithm 1, per place. Of a draft that was the only one that could have come, q is 1 there.
    """
    x = torch.tensor([draft.token for draft in drafts], device=p.device)
    alone = torch.nn.functional.one_hot(x, p.shape[1]).to(p.dtype)
    q = torch.stack([one if draft.probabilities is None else draft.probabilities for one, draft in zip(alone, drafts, strict=True)])
    accepted = torch.tensor(uniforms, device=p.device).unsqueeze(1) * (q * alone).sum(1, keepdim=True) < (p * alone).sum(1, keepdim=True)
    return torch.where(accepted, alone, residual(p, q))


def residual(p: Float[Tensor, "m n"], q: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """What p has beyond q, in proportion; p itself where rounding leaves nothing, for there they are the same."""
    beyond = (p - q).clamp(min=0)
    return torch.where(beyond.sum(1, keepdim=True) > 0, beyond, p)


def propose(
    logits: Float[Tensor, "m n"], sampling: Sampling, noise: Noise, places: Sequence[int], begun: int, withheld: Sequence[int] = ()
) -> list[Draft]:
    """One draft per row of logits, as local ids.

    Args:
        logits: of the drafter, over the legal ids of one slot, one row per place.
        sampling: settings of the request.
        noise: of the request.
        places: places in the stream, one per row.
        begun: length of the stream so far.
        withheld: local ids that may not be drafted. Rejection must know them beforehand; a coupled draft may be dropped for its value.
    """
    if not sampling.rejects:
        return [Draft(local) for local in choose(logits, sampling, noise, places)]
    logits = logits.float()
    if withheld:
        logits = logits.index_fill(1, torch.tensor(withheld, device=logits.device), float("-inf"))
    scores = warp(logits, sampling)
    drawn = _stacked([noise.of_draft(place, begun, scores.shape[1]) for place in places]).to(scores.device)
    return [Draft(x, q) for x, q in zip(_argmax(scores + drawn), scores.softmax(1), strict=True)]


def _argmax(scores: Float[Tensor, "m n"]) -> list[int]:
    # NumPy's is some ten times as fast on a few rows; it runs on CPUs only.
    return (scores.detach().numpy() if scores.device.type == "cpu" else scores).argmax(1).tolist()


def _stacked(rows: list[Float[Tensor, " n"]]) -> Float[Tensor, "m n"]:
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
