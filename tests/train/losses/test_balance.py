import pytest
import torch

from mmtp.train.losses.balance import BalanceConfig, Balancer
from mmtp.train.losses.terms import Term


def terms(output, scale=1.0):
    return {"l2": Term(3.0, scale * output.square().mean()), "l1": Term(1.0, (output - 1).abs().sum())}


def gradients(output):
    return {name: torch.autograd.grad(term.value, output, retain_graph=True)[0] for name, term in terms(output).items()}


def test_gradients_have_the_shares_that_weights_say_and_the_value_is_the_weighted_sum():
    balancer = Balancer(BalanceConfig(), ["l1", "l2", "mel"])
    output = torch.randn(2, 1, 8, requires_grad=True)
    wanted = torch.zeros_like(output)
    for name, share in (("l2", 0.75), ("l1", 0.25)):
        gradient = gradients(output)[name]
        wanted += share * gradient / gradient.flatten(1).norm(dim=1).mean()
    loss = balancer(terms(output), output)
    loss.backward()
    torch.testing.assert_close(output.grad, wanted)
    assert loss.item() == pytest.approx(sum(weight * value.item() for weight, value in terms(output).values()), rel=1e-5)


def test_the_size_of_a_term_does_not_matter():
    found = []
    for scale in (1.0, 1000.0):
        output = torch.linspace(-1, 2, 8).reshape(1, 1, 8).requires_grad_()
        Balancer(BalanceConfig(), ["l1", "l2"])(terms(output, scale), output).backward()
        found.append(output.grad)
    torch.testing.assert_close(found[0], found[1])


def test_norms_are_running_means_corrected_for_their_start():
    balancer = Balancer(BalanceConfig(decay=0.5), ["a"])
    for size, mean in ((4.0, 4.0), (1.0, (0.25 * 4 + 0.5 * 1) / 0.75)):
        output = torch.ones(1, 1, requires_grad=True)
        balancer({"a": Term(1.0, size * output.sum())}, output).backward()
        assert output.grad.item() == pytest.approx(size / mean)


def test_norms_are_state():
    balancer, again = Balancer(BalanceConfig(), ["l1", "l2"]), Balancer(BalanceConfig(), ["l1", "l2"])
    output = torch.randn(1, 1, 8, requires_grad=True)
    balancer(terms(output), output)
    again.load_state_dict(balancer.state_dict())
    other = torch.randn(1, 1, 8, requires_grad=True)
    grads = [torch.autograd.grad(b(terms(other), other), other)[0] for b in (balancer, again)]
    assert torch.equal(*grads)


def test_a_term_without_gradient_does_no_harm():
    output = torch.zeros(1, 4, requires_grad=True)
    Balancer(BalanceConfig(), ["a"])({"a": Term(1.0, output.square().sum())}, output).backward()
    assert torch.equal(output.grad, torch.zeros(1, 4))
