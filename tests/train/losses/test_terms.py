import torch

from mmtp.train.losses.terms import Term, weighted_sum


def test_weighted_sum_and_its_gradient():
    value = torch.tensor(3.0, requires_grad=True)
    total = weighted_sum({"a": Term(0.5, value), "b": Term(2.0, value.square())})
    total.backward()
    assert (total.item(), value.grad.item()) == (19.5, 12.5)
