"""Choosing a token: temperature, top-k, top-p, and noise that is a pure function of (seed, place in the stream).

A sample from ``softmax(l)`` is ``argmax(l + G)`` with Gumbel noise G (Gumbel 1954; Maddison et al. 2014, eq. 4). When the noise of
a place depends on nothing but the seed and the place, drafts can be drawn with the very noise that the target will meet there:
a good draft is then accepted often, and what comes out is the sequence that plain sampling with that seed gives, token for token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.types import MmtpError


class SamplingError(MmtpError):
    """Sampling settings outside their range."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token. Of vectors it scales the noise that they are made of.
        top_k: keep the k most probable; 0 keeps all.
        top_p: keep the most probable until their sum reaches p (Holtzman et al. 2020, section 3.1); 1 keeps all.
        guidance: scale w of classifier-free guidance inside pictures, sounds and videos: logits become ``u + w (c - u)``, where c
            knows the prompt and u the span alone (Ho & Salimans, arXiv 2207.12598, eq. 6 with w - 1 for their w). 1 guides nothing.
        seed: decides the noise; equal seeds give equal streams.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise SamplingError(f"temperature {self.temperature}: a number from 0 up is wanted")
        if self.top_k < 0:
            raise SamplingError(f"top_k {self.top_k}: 0 (all) or a number of tokens is wanted")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p {self.top_p}: a number above 0 and up to 1 is wanted")
        if not 0 <= self.guidance < float("inf"):
            raise SamplingError(f"guidance {self.guidance}: a number from 0 up is wanted; 1 guides nothing")
        if not 0 <= self.seed < 2**64:
            raise SamplingError(f"seed {self.seed}: a number from 0 to 2^64 - 1 is wanted")


class Noise:
    """Gumbel noise by place in the stream. Places that were drafted in vain are drawn once and kept until they are passed.

    Args:
        seed: of the request.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._kept: dict[int, Float[Tensor, " n"]] = {}

    def at(self, place: int, size: int) -> Float[Tensor, " n"]:
        """Noise over ``size`` legal ids at a place."""
        kept = self._kept.get(place)
        if kept is None or kept.shape[0] != size:
            generator = np.random.Generator(np.random.Philox(key=self.seed, counter=(0, 0, 0, place)))
            # -log(E) of an exponential E is Gumbel; E is drawn in float32 and is never 0 after the clip.
            exponential = generator.standard_exponential(size, dtype=np.float32)
            kept = torch.from_numpy(-np.log(np.maximum(exponential, np.float32(1e-38))))
            self._kept[place] = kept
        return kept

    def forget_before(self, place: int) -> None:
        """Drops what will not be asked for again."""
        for passed in [p for p in self._kept if p < place]:
            del self._kept[passed]


def gaussian(seed: int, place: int, size: int) -> Float[Tensor, " n"]:
    """Normal noise that the vector at a place is made of."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, 1, place)))
    return torch.from_numpy(generator.standard_normal(size, dtype=np.float32))


def warp(logits: Float[Tensor, "m n"], sampling: Sampling) -> Float[Tensor, "m n"]:
    """Logits after temperature, top-k and top-p; what is cut away is -inf. Temperature 0 leaves them as they are."""
    if sampling.temperature == 0:
        return logits
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
    return logits


def choose(logits: Float[Tensor, "m n"], sampling: Sampling, noise: Noise, places: Sequence[int]) -> list[int]:
    """One token per row of logits, as local ids.

    Args:
        logits: over the legal ids of one slot, one row per place.
        sampling: settings of the request.
        noise: of the request.
        places: places in the stream, one per row.
    """
    scores = warp(logits.float(), sampling)
    if sampling.temperature > 0:
        drawn = [noise.at(place, scores.shape[1]) for place in places]
        scores = scores + (drawn[0].unsqueeze(0) if len(drawn) == 1 else torch.stack(drawn)).to(scores.device)
    return scores.argmax(1).tolist()
