"""Choosing a token: temperature, top-k, top-p, and noise that is a pure function of (seed, place in the stream).

A sample from ``softmax(l)`` is ``argmax(l + G)`` with Gumbel noise G (Gumbel 1954; Maddison et al. 2014, eq. 4). When the noise of
a place depends on nothing but the seed and the place, drafts can be drawn with the very noise that the target will meet there:
a good draft is then accepted often, and what comes out is the sequence that plain sampling with that seed gives, token for token.
That is verification by *coupling*.

Verification by *rejection* (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1) draws drafts with noise of their own and accepts
x ~ q with probability min(1, p(x) / q(x)); in place of one refused it samples from norm(max(p - q, 0)). The output is distributed as
that of plain sampling, but it is another sample. It accepts with probability 1 - TV(p, q), the most there can be; coupling with
somewhat less. For that to hold, nothing that leads to q may depend on the noise that judges the draft, nor on that which draws it:
a head's cache may hold traces of drafts that were refused, so no noise is ever used twice.

What a pass chooses behind a refused draft is a sample of its own distribution there, kept from the draft where it could be. So a way of
drafting by what the last pass left may go on in the same manner: :func:`redraw` turns that choice into a sample of the next q, keeping it
with the greatest chance there is, and the next pass turns that into one of its p. A place that is drafted again and again thus changes no
oftener than its distributions do (maximal coupling of successive drafts, as in MC-SJD, arXiv 2510.24211). It takes more of q than drawing
anew: at each place it may depend on places before it alone, in this round and in all before, or it knows of the token that it is to have
no part in.
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

from mmtp.nn import native
from mmtp.nn.picking import Choosing
from mmtp.nn.redraw import redraw as native_redraw
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

    @cached_property
    def choosing(self) -> Choosing | None:
        """The same for :func:`mmtp.nn.picking.pick`, but for guidance; None where that chooses otherwise: its top-p is of all, and here of
        what top-k has left.
        """
        if self.temperature == 0:
            return Choosing(1.0, 1.0, 0.0, 0)
        return None if self.top_k and self.top_p < 1 else Choosing(1 / self.temperature, self.top_p, self.min_p, self.top_k)

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
    """A token that was drawn for a place: proposed, or chosen by a pass.

    Attributes:
        token: vocabulary id, or id among the legal ones, as the holder has it.
        probabilities: of which it is a sample, over the legal ids of its slot. Only rejection asks for them; None where it was the only
            one that could have come.
    """

    token: int
    probabilities: Float[Tensor, " n"] | None = None


class Uniforms(NamedTuple):
    """Numbers from 0 to below 1 for a place in a round, as rejection wants them.

    Attributes:
        judge: whether the draft stands.
        replace: draws a token in its place.
        keep: whether what the last pass chose there is drafted.
        draft: draws a draft in its place.
    """

    judge: float
    replace: float
    keep: float
    draft: float


class Noise:
    """Noise by place in the stream. Gumbel noise of places that were drafted in vain is drawn once and kept until they are passed.

    Args:
        seed: of the request.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._kept: dict[int, Float[Tensor, " n"]] = {}
        self._round: tuple[int, list[Uniforms]] = (-1, [])
        self._generator = _Generator(seed)

    def at(self, place: int, size: int) -> Float[Tensor, " n"]:
        """Noise over ``size`` legal ids at a place."""
        kept = self._kept.get(place)
        if kept is None or kept.shape[0] != size:
            kept = self._kept[place] = _gumbel(self._generator.at(0, place), size)
        return kept

    def uniforms(self, place: int, begun: int) -> Uniforms:
        """What a draft is drawn and judged by.

        Args:
            place: that of the draft.
            begun: length of the stream when it is made and judged, so that a place drafted again meets other noise.
        """
        ahead, (of, numbers) = place - begun, self._round
        if of != begun or ahead >= len(numbers):
            # As many as mostly are asked for; of more these are the first as well.
            drawn = self._generator.at(2, begun).random((max(2 * ahead, 16), 4)).tolist()
            self._round = begun, [Uniforms(*each) for each in drawn]
        return self._round[1][ahead]

    def forget_before(self, place: int) -> None:
        """Drops what will not be asked for again."""
        for passed in [p for p in self._kept if p < place]:
            del self._kept[passed]


def gaussian(seed: int, place: int, size: int) -> Float[Tensor, " n"]:
    """Normal noise that the vector at a place is made of."""
    return torch.from_numpy(_Generator(seed).at(1, place).standard_normal(size, dtype=np.float32))


class _Generator:
    """Independent streams of random numbers, by what they are for and where: ``Philox(key=seed, counter=(0, 0, use, place))``."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)
        self._numbers = np.random.Generator(self._bits)
        self._start = self._bits.state

    def at(self, use: int, place: int) -> np.random.Generator:
        """The beginning of a stream. It holds up to the next call: a generator made anew costs as much as a small product."""
        self._start["state"]["counter"][:] = (0, 0, use, place)
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
    logits: Float[Tensor, "m n"],
    sampling: Sampling,
    noise: Noise,
    places: Sequence[int],
    drafts: Sequence[Draft | None] | None = None,
    begun: int | None = None,
) -> list[Draft]:
    """One token per row of logits, as local ids.

    Args:
        logits: over the legal ids of one slot, one row per place.
        sampling: settings of the request.
        noise: of the request.
        places: places in the stream, one per row.
        drafts: what was proposed there, as local ids; only rejection sampling looks at it. A token other than the draft refuses it.
        begun: length of the stream before the pass, where it judges drafts: rejection then draws by numbers of this pass, for behind one
            that is refused nothing is settled. None where there are none, and every place is.
    """
    scores = warp(logits.float(), sampling)
    if sampling.rejects and begun is not None:
        uniforms = [noise.uniforms(place, begun) for place in places]
        return redraw(scores, drafts or [None] * len(places), [(each.judge, each.replace) for each in uniforms])
    if sampling.temperature > 0:
        scores = scores + _stacked([noise.at(place, scores.shape[1]) for place in places]).to(scores.device)
    return [Draft(x) for x in _argmax(scores)]


def redraw(scores: Float[Tensor, "m n"], drawn: Sequence[Draft | None], numbers: Sequence[tuple[float, float]]) -> list[Draft]:
    """A sample of the softmax of each row, and as often as can be the one that was drawn of another distribution before.

    Leviathan et al. 2023, algorithm 1, per row: the maximal coupling of both distributions.

    Args:
        scores: logits, as :func:`warp` leaves them.
        drawn: what was drawn before; None where nothing was. What was the only one that could have come had probability 1.
        numbers: two per row, from 0 to below 1: whether what was drawn is kept, and what else is drawn.
    """
    if scores.device.type == "cpu" and native.usable():
        tokens, p = native_redraw(scores, drawn, numbers)
        return [Draft(x, each) for x, each in zip(tokens, p, strict=True)]
    drafts = []
    for each, p, (keep, draw) in zip(drawn, scores.softmax(1), numbers, strict=True):
        of = None if each is None else each.probabilities
        if each is not None and keep * (1.0 if of is None else float(of[each.token])) < float(p[each.token]):
            drafts.append(Draft(each.token, p))
        else:
            drafts.append(Draft(_sample(p if each is None else _residual(p, each), draw), p))
    return drafts


def _residual(p: Float[Tensor, " n"], drawn: Draft) -> Float[Tensor, " n"]:
    """What p has beyond the distribution of what was drawn, in proportion; p itself where rounding leaves nothing, for there they are the
    same.
    """
    if drawn.probabilities is None:
        beyond = p.index_fill(0, torch.tensor([drawn.token], device=p.device), 0.0)
    else:
        beyond = (p - drawn.probabilities).clamp(min=0)
    return beyond if beyond.any() else p


def _sample(weights: Float[Tensor, " n"], number: float) -> int:
    """An index in proportion to weights, by a number from 0 to below 1."""
    sums = weights.double().cumsum(0)
    # A product may round up to the sum; the last that has any weight is meant then.
    return min(int(torch.searchsorted(sums, number * sums[-1], right=True)), int((sums < sums[-1]).sum()))


def propose(
    logits: Float[Tensor, "m n"],
    sampling: Sampling,
    noise: Noise,
    places: Sequence[int],
    begun: int,
    withheld: Sequence[int] = (),
    left: Sequence[Draft | None] | None = None,
) -> list[Draft]:
    """One draft per row of logits, as local ids.

    Args:
        logits: of the drafter, over the legal ids of one slot, one row per place.
        sampling: settings of the request.
        noise: of the request.
        places: places in the stream, one per row.
        begun: length of the stream so far.
        withheld: local ids that may not be drafted. Rejection must know them beforehand; a coupled draft may be dropped for its value.
        left: what the last pass chose there, which rejection keeps where it can. Logits have to depend on nothing behind their place then.
    """
    if not sampling.rejects:
        return choose(logits, sampling, noise, places)
    logits = logits.float()
    if withheld:
        logits = logits.index_fill(1, torch.tensor(withheld, device=logits.device), float("-inf"))
    uniforms = [noise.uniforms(place, begun) for place in places]
    return redraw(warp(logits, sampling), left or [None] * len(places), [(each.keep, each.draft) for each in uniforms])


def _argmax(scores: Float[Tensor, "m n"]) -> list[int]:
    # NumPy's is some ten times as fast on a few rows; it runs on CPUs only.
    return (scores.detach().numpy() if scores.device.type == "cpu" else scores).argmax(1).tolist()


def _stacked(rows: list[Float[Tensor, " n"]]) -> Float[Tensor, "m n"]:
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
