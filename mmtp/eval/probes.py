"""What the features of a picture tokenizer know: labels of held-out pictures read from them, and what other networks see.

Nothing of the tokenizer is trained here. Everything that is fitted is fitted on a bank of pictures and measured on others.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.eval.report import Table
from mmtp.models.teachers import Teacher
from mmtp.models.two_towers import TwoTowers
from mmtp.types import MmtpError, Modality

NEIGHBOURS = 10
BATCH = 32


class ProbeError(MmtpError):
    """A probe that cannot be made."""


@dataclass(frozen=True)
class Labelled:
    """Pictures of one size with a label each.

    Attributes:
        pictures: values in [0, 1].
        labels: of every picture.
        captions: of every picture; empty where it has none.
    """

    pictures: Float[Tensor, "b 3 h w"]
    labels: tuple[str, ...]
    captions: tuple[str, ...]

    @staticmethod
    def of(samples: Iterable[tuple[Float[Tensor, "3 h w"], str, str]]) -> "Labelled":
        """Gathers pictures with their labels and captions.

        Raises:
            ProbeError: there are none.
        """
        found = list(samples)
        if not found:
            raise ProbeError("no picture has the label that is asked for")
        pictures, labels, captions = zip(*found, strict=True)
        return Labelled(torch.stack(pictures), labels, captions)


@dataclass(frozen=True)
class Probed:
    """What was found of one maker of features; shares are of the held-out pictures.

    Attributes:
        name: what tables call it.
        width: of its features.
        neighbours: share whose label the nearest pictures of the bank have.
        linear: share whose label a linear classifier reads.
        cosines: mean cosine of every teacher's features with what a linear map reads of them, over patches.
    """

    name: str
    width: int
    neighbours: float
    linear: float
    cosines: dict[str, float]


Maker = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b n d"]]
"""Pictures in [0, 1] to a vector per patch."""


def tokenizer_features(tokenizer: Any) -> Maker:
    """The patches of a continuous picture tokenizer, without class token and registers.

    Raises:
        ProbeError: it is another kind of tokenizer.
    """
    if tokenizer.spec.modality is not Modality.IMAGE or not tokenizer.spec.latent_dim:
        raise ProbeError("features are probed of continuous picture tokenizers; this one is none")

    def features(pictures: Tensor) -> Tensor:
        latents = tokenizer.encode(list(pictures))
        return latents.values[:, (latents.coordinates[0] >= 0).all(1)]

    return features


def teacher_features(teacher: Teacher, grid: tuple[int, int]) -> Maker:
    """A teacher's features at a grid."""
    return lambda pictures: teacher.features(pictures * 2 - 1, grid).cpu()


def probe(tokenizer: Any, name: str, bank: Labelled, held_out: Labelled, teachers: Sequence[Teacher] = ()) -> list[Probed]:
    """Probes a tokenizer, the same tokenizer with new weights, and the teachers it learnt from.

    Args:
        tokenizer: a continuous picture tokenizer.
        name: what tables call it.
        bank: pictures to compare with and to fit on.
        held_out: pictures to measure on, of the same size.
        teachers: networks whose features are to be read from the tokenizer's.

    Raises:
        ProbeError: the tokenizer is of another kind, or no label of the bank is held out.
    """
    known = sorted(set(bank.labels))
    if not set(known) & set(held_out.labels):
        raise ProbeError("no label of the held-out pictures stands in the bank")
    labels, wanted = (torch.tensor([known.index(v) if v in known else -1 for v in part.labels]) for part in (bank, held_out))
    rows, columns = tokenizer.grid(bank.pictures.shape[2:])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = tokenizer.config.build().eval()
    seen = [[_all(teacher_features(t, (rows, columns)), part.pictures) for part in (bank, held_out)] for t in teachers]
    makers = [(name, tokenizer_features(tokenizer)), ("the same, untrained", tokenizer_features(untrained))]
    found = []
    for title, maker in makers:
        a, b = (_all(maker, part.pictures) for part in (bank, held_out))
        cosines = {t.config.name: readout_cosine(a, ta, b, tb) for t, (ta, tb) in zip(teachers, seen, strict=True)}
        found.append(_probed(title, a, b, labels, wanted, cosines))
    for teacher, (a, b) in zip(teachers, seen, strict=True):
        found.append(_probed(f"teacher {teacher.config.name}", a, b, labels, wanted, {}))
    return found


def probe_table(found: Sequence[Probed], caption: str) -> Table:
    """All that was found, a row each."""
    teachers = list(found[0].cosines)
    columns = ["features", "width", f"{NEIGHBOURS} nearest", "linear", *(f"cosine to {t}" for t in teachers)]
    rows = [
        [p.name, p.width, f"{p.neighbours:.3f}", f"{p.linear:.3f}", *(f"{p.cosines[t]:.3f}" if t in p.cosines else None for t in teachers)]
        for p in found
    ]
    return Table(columns, rows, caption)


@torch.no_grad()
def retrieval(tokenizer: Any, towers: TwoTowers, held_out: Labelled) -> dict[str, float]:
    """How often pictures and captions find each other among all that are held out; pictures without a caption are left out.

    Returns:
        ``pictures`` and ``captions``, how many of each; ``picture_to_text@k``, the share of pictures whose caption is among the k
        nearest captions; ``text_to_picture@k``, the share of captions of which a picture is among the k nearest pictures; k is 1, 5, 10.
    """
    said = [i for i, caption in enumerate(held_out.captions) if caption]
    if not said:
        raise ProbeError("no held-out picture has a caption")
    captions = sorted({held_out.captions[i] for i in said})
    own = torch.tensor([captions.index(held_out.captions[i]) for i in said])
    pictures = towers.embed_features(_all(tokenizer_features(tokenizer), held_out.pictures[said]))
    similarity = pictures @ torch.cat([towers.embed_texts(captions[i : i + BATCH]) for i in range(0, len(captions), BATCH)]).T
    found = {"pictures": float(len(said)), "captions": float(len(captions))}
    for k in (1, 5, 10):
        near = similarity.topk(min(k, len(captions)), dim=1).indices
        found[f"picture_to_text@{k}"] = (near == own[:, None]).any(1).double().mean().item()
        near = own[similarity.T.topk(min(k, len(said)), dim=1).indices]
        found[f"text_to_picture@{k}"] = (near == torch.arange(len(captions))[:, None]).any(1).double().mean().item()
    return found


def nearest(
    bank: Float[Tensor, "m d"], labels: Int[Tensor, " m"], queries: Float[Tensor, "q d"], neighbours: int = NEIGHBOURS
) -> Int[Tensor, " q"]:
    """The label that the nearest entries of a bank vote for, each with exp(cosine / 0.07).

    Wu et al. 2018 (arXiv 1805.01978, section 3.4).
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    weights, places = similarity.topk(min(neighbours, len(bank)), dim=1)
    votes = torch.zeros(len(queries), int(labels.max()) + 1).scatter_add_(1, labels[places], (weights / 0.07).exp())
    return votes.argmax(1)


def linear_probe(bank: Float[Tensor, "m d"], labels: Int[Tensor, " m"], queries: Float[Tensor, "q d"]) -> Int[Tensor, " q"]:
    """The label that multinomial logistic regression gives, with an L2 penalty of 1/m on weights of standardised features; by L-BFGS."""
    mean, std = bank.mean(0), bank.std(0).clamp(min=1e-6)
    x = (bank - mean) / std
    weight = torch.zeros(int(labels.max()) + 1, x.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)  # pyrefly: ignore
    with torch.no_grad():
        return (((queries - mean) / std) @ weight.T + bias).argmax(1)


def readout_cosine(
    bank: Float[Tensor, "m n d"], targets: Float[Tensor, "m n c"], queries: Float[Tensor, "q n d"], wanted: Float[Tensor, "q n c"]
) -> float:
    """How well other features can be read linearly from some: mean cosine, over the patches of the queries, with the standardised targets.

    The map (ridge regression) is fitted on the bank's patches, so that features of any width can be asked, trained towards these targets
    or not.
    """
    x, y = bank.flatten(0, 1).double(), targets.flatten(0, 1).double()
    mean, std = y.mean(0), y.std(0).clamp(min=1e-6)
    centre = x.mean(0)
    x = x - centre
    gram = x.T @ x
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram + ridge, x.T @ ((y - mean) / std))
    output = (queries.flatten(0, 1).double() - centre) @ weight
    return float(F.cosine_similarity(output, (wanted.flatten(0, 1).double() - mean) / std, dim=1).mean())


def _probed(name: str, bank: Tensor, queries: Tensor, labels: Tensor, wanted: Tensor, cosines: dict[str, float]) -> Probed:
    a, b = bank.mean(1), queries.mean(1)
    centre = a.mean(0)
    right = [(found == wanted).double().mean().item() for found in (nearest(a - centre, labels, b - centre), linear_probe(a, labels, b))]
    return Probed(name, bank.shape[2], right[0], right[1], cosines)


@torch.no_grad()
def _all(maker: Maker, pictures: Tensor) -> Tensor:
    return torch.cat([maker(part) for part in pictures.split(BATCH)]).float()
