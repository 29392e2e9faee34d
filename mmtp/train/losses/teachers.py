"""Two frozen teachers of a unified model: one for what it sees, one for what it says, and neither above the other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.config import Config, ConfigError
from mmtp.data.teacher_cache import CacheRecord
from mmtp.train.losses.distill import Statistics, adapter, feature_error
from mmtp.train.losses.terms import Term

LIMIT = 2.0
"""How many times the gradient of the one teacher that of the other may be."""


@dataclass(frozen=True, kw_only=True)
class ImageTeacherConfig(Config):
    """``[loss.distill.image]``.

    Attributes:
        teacher: name under which ``mmtp teach`` has kept what it says.
        weight: of its loss, which is 1 at the reference step.
        cosine: weight of one less the cosine.
        smooth_l1: weight of the smooth L1 error.
        lr: greatest learning rate of the adapter, which follows the model's schedule.
    """

    teacher: str
    weight: float = 1.0
    cosine: float = 0.5
    smooth_l1: float = 0.5
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.weight, self.lr) <= 0 or min(self.cosine, self.smooth_l1) < 0 or not self.cosine + self.smooth_l1:
            raise ValueError("weight and lr: more than 0 are wanted; cosine and smooth_l1: at least 0, and one of them above it")


@dataclass(frozen=True, kw_only=True)
class TextTeacherConfig(Config):
    """``[loss.distill.text]``.

    Attributes:
        teacher: name under which ``mmtp teach`` has kept what it says.
        weight: of its loss, which is 1 at the reference step.
        beta: of the generalised Jensen-Shannon divergence.
    """

    teacher: str
    weight: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.weight <= 0 or not 0 < self.beta < 1:
            raise ValueError(f"weight {self.weight:g}, beta {self.beta:g}: more than 0, and between 0 and 1, are wanted")


@dataclass(frozen=True, kw_only=True)
class TeachersConfig(Config):
    """``[loss.distill]`` of a model.

    Attributes:
        image: the visual teacher, heard at codes of pictures.
        text: the language teacher, heard at text tokens.
        decay: of the running mean of each loss.
        reference: steps after which the running means are kept: from there on each loss is told as a multiple of what it was then.
    """

    image: ImageTeacherConfig | None = None
    text: TextTeacherConfig | None = None
    decay: float = 0.98
    reference: int = 100

    def __post_init__(self) -> None:
        if self.image is None and self.text is None:
            raise ConfigError("loss.distill: give [loss.distill.image], [loss.distill.text], or both")
        if not 0 <= self.decay < 1 or self.reference < 1:
            raise ValueError(f"decay {self.decay:g}, reference {self.reference}: at least 0 and less than 1, and at least 1, are wanted")


class FeatureReader(nn.Module):
    """Reads a visual teacher's features from a model's states at the codes of pictures.

    Features are standardised channel by channel, as for :class:`~mmtp.train.losses.distill.Distiller`, by their moments over the data.

    Args:
        config: weights.
        width: of the states.
        statistics: of the features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageTeacherConfig, width: int, statistics: Statistics) -> None:
        super().__init__()
        self.config = config
        self.adapter = adapter(width, len(statistics.mean))
        self.register_buffer("mean", statistics.mean)
        self.register_buffer("std", statistics.std)

    def forward(self, states: Float[Tensor, "n d"], features: Float[Tensor, "n c"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean error over positions, and mean cosine."""
        target = (features.float() - self.mean) / self.std
        error, cosine = feature_error(self.adapter(states), target, self.config.cosine, self.config.smooth_l1)
        return error.mean(), cosine.mean()


def feature_statistics(records: Iterable[CacheRecord], width: int) -> Statistics:
    """Mean and deviation of a visual teacher's features over all that it was asked about."""
    kept = [record for record in records if record.answers]
    count = max(1, sum(record.answers for record in kept))
    sums, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for record in kept:
        sums += torch.tensor(record.sums, dtype=torch.float64)
        squares += torch.tensor(record.squares, dtype=torch.float64)
    return Statistics.of_moments(sums / count, squares / count)


class Balanced(NamedTuple):
    """What teachers say, added up.

    Attributes:
        value: of the sum.
        gradients: of the sum, at all that it was computed from.
        numbers: for the log.
    """

    value: float
    gradients: list[Tensor]
    numbers: dict[str, float]


class TeacherBalance(nn.Module):
    """Adds up what teachers say so that none drowns the other.

    Each loss is divided by its running mean, which is kept from a reference step on: so it is about 1 there, whatever its unit, and falls
    from then on. Times its fixed weight, its gradient at the model's last shared states is measured; where one teacher's is more than
    :data:`LIMIT` times the other's, it is scaled down to that, in every step anew.

    Args:
        config: memory of the running means, and the reference.
        names: of all losses that may come.
    """

    means: Tensor
    seen: Tensor

    def __init__(self, config: TeachersConfig, names: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.names = tuple(names)
        self.register_buffer("means", torch.zeros(len(self.names), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(len(self.names), dtype=torch.long))

    def forward(self, terms: Mapping[str, Term], *leaves: Tensor) -> Balanced:
        """The sum of the balanced losses, and what it sends back.

        Args:
            terms: losses by name, with their weights; those of which the batch holds nothing are missing.
            leaves: what the losses were computed from, without the graph behind it: a tied unembedding would else be reached through the
                states as well. The first are the shared states, at which the teachers are compared.
        """
        parts: dict[str, list[Tensor]] = {}
        values, norms, numbers = {}, {}, {}
        for name, term in terms.items():
            value = term.value.item()
            scale = term.weight / self._unit(name, value)
            found = torch.autograd.grad(term.value, leaves, allow_unused=True)
            parts[name] = [torch.zeros_like(x) if g is None else scale * g for x, g in zip(leaves, found, strict=True)]
            values[name], norms[name] = scale * value, parts[name][0].float().norm().item()
            numbers |= {f"distill.{name}": value, f"distill.{name}.grad": norms[name]}
        if len(norms) == 2:
            first, second = norms.values()
            numbers["distill.ratio"] = first / max(second, 1e-12)
        total, gradients = 0.0, [torch.zeros_like(x) for x in leaves]
        for name, factor in factors(norms).items():
            total += factor * values[name]
            for gradient, part in zip(gradients, parts[name], strict=True):
                gradient.add_(part, alpha=factor)
        return Balanced(total, gradients, numbers)

    def _unit(self, name: str, value: float) -> float:
        """What a loss is measured in: its running mean, corrected for its start at zero; it rests from the reference step on."""
        i = self.names.index(name)
        if self.seen[i] < self.config.reference:
            self.means[i] = self.config.decay * self.means[i] + (1 - self.config.decay) * value
            self.seen[i] += 1
        return max(self.means[i].item() / (1 - self.config.decay ** self.seen[i].item()), 1e-8)


def factors(norms: Mapping[str, float]) -> dict[str, float]:
    """Factors of at most 1 by which no gradient is more than :data:`LIMIT` times another; one that is zero takes no part."""
    least = min((norm for norm in norms.values() if norm), default=0.0)
    return {name: min(1.0, LIMIT * least / norm) if norm else 1.0 for name, norm in norms.items()}


def with_gradient(value: float, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Float[Tensor, ""]:
    """A scalar of this value whose gradient at the inputs is what is given."""
    carrier = torch.stack([(x * gradient).sum().float() for x, gradient in zip(inputs, gradients, strict=True)]).sum()
    return value + carrier - carrier.detach()
