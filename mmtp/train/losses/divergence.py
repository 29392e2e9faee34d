"""How far apart two next-token distributions are of which only some tokens are known one by one."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmtp.models.loss import local_ids
from mmtp.stream.vocab import VocabLayout
from mmtp.types import Batch

LEAST = -1e4
"""Stands for the logarithm of 0."""


def generalised_jsd(teacher: Float[Tensor, "n c"], student: Float[Tensor, "n c"], beta: float) -> Float[Tensor, " n"]:
    """Generalised Jensen-Shannon divergence, in nats (GKD: Agarwal et al. 2024, arXiv 2306.13649, section 3, equation 1).

    ``beta KL(P || M) + (1 - beta) KL(Q || M)`` with ``M = beta P + (1 - beta) Q``. Near 0 it acts as ``beta KL(P || Q)``, which has the
    student cover all that the teacher says; near 1 as ``(1 - beta) KL(Q || P)``, which has it keep to what the teacher says.

    Args:
        teacher: logarithms of P.
        student: logarithms of Q.
        beta: between 0 and 1.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    return (beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)).sum(1)


def with_tail(log_probs: Float[Tensor, "n k"]) -> Float[Tensor, "n k+1"]:
    """A distribution of which some tokens are kept, with one bucket more for all the others.

    What is kept in half precision may come to a little more than 1, and is then brought back to it.
    """
    kept = log_probs.float().clamp(min=LEAST)
    rest = (1 - kept.exp().sum(1, keepdim=True)).clamp(min=0).log().clamp(min=LEAST)
    return torch.cat((kept, rest), 1).log_softmax(1)


def bucket_log_probs(logits: Float[Tensor, "n v"], ids: Int[Tensor, "n k"]) -> Float[Tensor, "n k+1"]:
    """Logarithms of the probabilities of some tokens, and of all the others together."""
    logits = logits.float()
    rest = logits.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True).clamp(min=LEAST)
    return torch.cat((logits.gather(1, ids), rest), 1) - logits.logsumexp(1, keepdim=True)


def language_divergence(
    states: Float[Tensor, "b s d"],
    unembedding: Float[Tensor, "v d"],
    batch: Batch,
    layout: VocabLayout,
    places: Int[Tensor, " n"],
    ids: Int[Tensor, "n k"],
    log_probs: Float[Tensor, "n k"],
    beta: float,
    chunk_rows: int = 1024,
) -> Float[Tensor, ""]:
    """Mean divergence of a model's next-token distributions from a teacher's, over some text tokens of a batch.

    The model's distribution is that of its cross-entropy: over all ids that the grammar allows. Logits are made a chunk of rows at a time,
    and again in the backward pass.

    Args:
        states: that predict the next token.
        unembedding: one row per vocabulary id.
        batch: the packed rows.
        layout: gives each slot's legal ids.
        places: flat index (row * s + position) of every text token that the teacher has predicted.
        ids: local ids of the text tokenizer that the teacher finds most probable there.
        log_probs: theirs.
        beta: of the divergence.
        chunk_rows: rows whose logits are in memory at a time.
    """
    flat, slots = states.flatten(0, 1), batch.slots.flatten()[places]
    total = states.new_zeros((), dtype=torch.float32)
    for index in slots.unique().tolist():
        ranges = layout.slots[index].generable
        weight = torch.cat([unembedding[low:high] for low, high in ranges])
        chosen = (slots == index).nonzero()[:, 0]
        for rows in chosen.split(chunk_rows):
            local = local_ids((ids[rows] + layout.text_range[0]).flatten(), ranges).view(len(rows), -1)
            teacher = with_tail(log_probs[rows])
            total = total + checkpoint(_divergence, flat[places[rows] - 1], weight, local, teacher, beta, use_reentrant=False)
    return total / len(places)


def _divergence(x: Tensor, weight: Tensor, local: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return generalised_jsd(teacher, bucket_log_probs(x @ weight.T, local), beta).sum()
