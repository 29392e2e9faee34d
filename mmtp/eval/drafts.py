"""What drafts of one medium do to the output: nothing, as long as decoding is lossless.

The drafts of one modality are spoiled, those of the others are left alone. Every token must stay as it was, of this modality and of the
others; only the share of drafts that stand may fall. Drafts that know nothing say as well how often drafts stand by chance: draft and
target are drawn with the same noise, which makes that more often than one in so many ids.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling
from mmtp.eval.decoding import Prompt
from mmtp.models.heads.base import Places, vertical
from mmtp.types import Modality

LOUD = 10.0  # standard deviation of states that stand for a random choice


class SpoiledHead(nn.Module):
    """A head whose drafts are worthless.

    Args:
        head: what it stands for; its caches and what its depths hand on are as before.
        modality: whose drafts; None: all.
        random: draft random ids; else all ids are equally probable, and the noise of the place decides.
    """

    def __init__(self, head: Any, modality: Modality | None = None, random: bool = True) -> None:
        super().__init__()
        self.head = head
        self.modality, self.random = modality, random
        self.generator = torch.Generator().manual_seed(0)
        self.config, self.mtp_depth, self.vertical = head.config, head.mtp_depth, vertical(head)
        self.num_modules, self.num_caches = head.num_modules, head.num_caches

    def draft(
        self, depth: int, state: Float[Tensor, "b s *state"], embedded: Float[Tensor, "b s d"], places: Places, caches: Sequence[Any]
    ) -> tuple[Float[Tensor, "b s *left"], Float[Tensor, "b s d"]]:
        left, out = self.head.draft(depth, state, embedded, places, caches)
        return left, self._spoil(out, places)

    def below(
        self, hidden: Float[Tensor, "b s d"], embedded: Float[Tensor, "b s d"], places: Places, caches: Sequence[Any]
    ) -> Float[Tensor, "b s d"]:
        return self._spoil(self.head.below(hidden, embedded, places, caches), places)

    def _spoil(self, out: Float[Tensor, "b s d"], places: Places) -> Float[Tensor, "b s d"]:
        worthless = LOUD * torch.randn(out.shape, generator=self.generator).to(out) if self.random else torch.zeros_like(out)
        if self.modality is None:
            return worthless
        return torch.where((places.modality == self.modality.index).unsqueeze(2), worthless, out)


@contextmanager
def spoiled(model: Any, modality: Modality | None = None, random: bool = True) -> Iterator[None]:
    """Gives a model a :class:`SpoiledHead` for a while."""
    head = model.head
    model.head = SpoiledHead(head, modality, random)
    try:
        yield
    finally:
        model.head = head


@dataclass(frozen=True)
class Drafting:
    """Streams of some prompts, and what became of their drafts.

    Attributes:
        tokens: new tokens of every stream.
        drafted: drafts, by (modality, offset).
        accepted: those that stood.
    """

    tokens: Sequence[Sequence[int]]
    drafted: Counter[tuple[str, int]]
    accepted: Counter[tuple[str, int]]

    def share(self, modality: str) -> float | None:
        """Share of a modality's drafts that stood; None where there were none."""
        drafted, accepted = (sum(n for (m, _), n in count.items() if m == modality) for count in (self.drafted, self.accepted))
        return accepted / drafted if drafted else None


@dataclass(frozen=True)
class Propagation:
    """Drafting before and after the drafts of one modality were spoiled.

    Attributes:
        modality: the one.
        before: with the model's own drafts.
        after: with spoiled ones.
    """

    modality: Modality
    before: Drafting
    after: Drafting

    @property
    def equal(self) -> bool:
        """Whether no token moved."""
        return self.before.tokens == self.after.tokens


def draft(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> Drafting:
    """Decodes every prompt speculatively; seeds count up from the sampling's."""
    tokens, drafted, accepted = [], Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for i, prompt in enumerate(prompts):
        chosen = replace(sampling, seed=sampling.seed + i)
        run = engine.generate(prompt.tokens, chosen, prompt.max_new_tokens, True, prompt.stop)
        tokens.append(run.new_tokens)
        drafted.update(run.stats.drafted)
        accepted.update(run.stats.accepted)
    return Drafting(tokens, drafted, accepted)


def propagation(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, modalities: Sequence[Modality], before: Drafting | None = None
) -> list[Propagation]:
    """Spoils the drafts of one modality after the other.

    Args:
        engine: in exact mode, in which tokens are promised to be equal.
        prompts: what to continue.
        sampling: of all streams.
        modalities: whose drafts are spoiled.
        before: what :func:`draft` gave for these, where that is known.
    """
    before = before or draft(engine, prompts, sampling)
    found = []
    for modality in modalities:
        with spoiled(engine.model, modality):
            found.append(Propagation(modality, before, draft(engine, prompts, sampling)))
    return found


def uninformed(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> Drafting:
    """Drafting by a head that knows nothing: what is accepted is accepted by chance."""
    with spoiled(engine.model, random=False):
        return draft(engine, prompts, sampling)
