import math

import pytest
import torch
import torch.nn.functional as F

from mmtp.train.losses.divergence import bucket_log_probs, generalised_jsd, language_divergence, with_tail
from mmtp.types import Modality
from tests.models.common import LAYOUT, batch, model


def dense_jsd(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """The definition, over probabilities in double precision."""
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_equals_the_definition_where_all_tokens_are_known(beta: float) -> None:
    teacher, student = (4 * torch.randn(6, 40, dtype=torch.float64)).log_softmax(1), torch.randn(6, 40, dtype=torch.float64)
    student.requires_grad_()
    found = generalised_jsd(teacher, student.log_softmax(1), beta)
    wanted = dense_jsd(teacher.exp(), student.softmax(1), beta)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


def test_limits_and_bounds() -> None:
    p, q = (torch.randn(5, 30, dtype=torch.float64).log_softmax(1) for _ in range(2))
    assert generalised_jsd(p, p, 0.3).abs().max() < 1e-14
    torch.testing.assert_close(generalised_jsd(p, q, 0.5), generalised_jsd(q, p, 0.5))
    assert generalised_jsd(p, q, 0.5).max() < math.log(2)
    for beta, forward, scale in ((1e-6, (q, p), 1e-6), (1 - 1e-6, (p, q), 1e-6)):
        wanted = F.kl_div(*forward, reduction="none", log_target=True).sum(1)
        torch.testing.assert_close(generalised_jsd(p, q, beta) / scale, wanted, rtol=1e-4, atol=1e-6)


def test_buckets_are_the_merged_distributions() -> None:
    """Over k tokens and a tail it is the divergence of the distributions in which all other tokens are one."""
    teacher, logits = torch.randn(4, 50).log_softmax(1), torch.randn(4, 50)
    top = teacher.topk(7, dim=1)
    rest = torch.ones(4, 50).scatter(1, top.indices, 0.0)

    def merged(p: torch.Tensor) -> torch.Tensor:
        return torch.cat((p.gather(1, top.indices), (p * rest).sum(1, keepdim=True)), 1).double()

    p, q = with_tail(top.values), bucket_log_probs(logits, top.indices)
    torch.testing.assert_close(p.exp().double(), merged(teacher.exp()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q.exp().double(), merged(logits.softmax(1)), rtol=1e-5, atol=1e-6)
    wanted = dense_jsd(merged(teacher.exp()), merged(logits.softmax(1)), 0.5)
    torch.testing.assert_close(generalised_jsd(p, q, 0.5).double(), wanted, rtol=1e-4, atol=1e-6)
    assert (generalised_jsd(p, q, 0.5).double() <= dense_jsd(teacher.exp().double(), logits.softmax(1).double(), 0.5)).all()


def test_certainty_and_rounding_leave_finite_gradients() -> None:
    certain = torch.tensor([[0.0, -40.0], [-0.6929, -0.6929], [-30.0, -30.0]]).half()  # a tail of 0, a sum of a little over 1, nothing kept
    found = with_tail(certain)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(3))
    logits = torch.tensor([[200.0, -200.0, -200.0, -200.0]]).repeat(3, 1).requires_grad_()
    value = generalised_jsd(found, bucket_log_probs(logits, torch.tensor([[0, 1]] * 3)), 0.5).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all()


def test_a_model_is_compared_at_text_tokens_over_all_that_the_grammar_allows() -> None:
    student, rows = model(0), batch()
    states = student(rows)[0].detach().requires_grad_()
    slots = rows.slots.flatten()
    lo, hi = LAYOUT.text_range
    words = ((rows.tokens >= lo) & (rows.tokens < hi)).flatten().nonzero()[:, 0]
    places = words[torch.randperm(len(words))[:9]]
    assert {LAYOUT.slots[i].name for i in slots[places].tolist()} == {"turn"}
    teacher = torch.randn(9, 50).log_softmax(1)
    top = teacher.topk(6, dim=1)
    weight = student.unembedding.weight
    found = language_divergence(states, weight, rows, LAYOUT, places, top.indices, top.values, 0.5, chunk_rows=4)
    allowed = torch.cat([torch.arange(*r) for r in LAYOUT.slots[int(slots[places[0]])].generable])
    logits = states.flatten(0, 1)[places - 1] @ weight[allowed].T
    local = (top.indices[..., None] + lo == allowed).nonzero()[:, 2].view(9, 6)
    wanted = generalised_jsd(with_tail(top.values), bucket_log_probs(logits, local), 0.5).mean()
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(value, (states, weight)) for value in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    codes = LAYOUT.code_range(Modality.IMAGE)
    assert not gradients[0][1][slice(*codes)].any()  # codes of pictures are no words, and the language teacher says nothing of them
    assert not gradients[0][0].flatten(0, 1)[[p - 1 for p in range(len(slots)) if p not in places.tolist() and p]].any()
