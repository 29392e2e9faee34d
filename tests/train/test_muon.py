import pytest
import torch

from mmtp.train import muon
from mmtp.train.muon import Muon, orthogonal, quick_dtype

GROUP = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5, "eps": 1e-7}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request, monkeypatch):
    monkeypatch.setattr(muon, "quick_dtype", lambda device: request.param)
    return request.param


def weights(seed: int) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in [(6, 10), (10, 6), (6, 10), (6, 6)]]


def test_the_update_is_that_of_torch_as_far_as_its_bfloat16_goes(dtype):
    ours, theirs = weights(0), weights(0)
    pair = Muon(ours, lr=0.1, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for group, optimizer in zip((ours, theirs), pair, strict=True):
            for weight, gradient in zip(group, weights(step + 1), strict=True):
                weight.grad = gradient.detach().clone()
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0.02)
    assert {tuple(state) for state in pair[0].state.values()} == {("momentum_buffer",)} == {tuple(s) for s in pair[1].state.values()}


def test_singular_values_come_near_one_and_vectors_stay(dtype):
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrices, GROUP).float()
    values = torch.linalg.svdvals(found)
    assert ((values > 0.6) & (values < 1.3)).all()
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.linalg.vecdot((u @ v).flatten(1), found.flatten(1)).div(found.norm(dim=(1, 2)) * 8**0.5).min() > 0.95
    torch.testing.assert_close(orthogonal(matrices.mT, GROUP).float(), found.mT, rtol=0, atol=0.02)


def test_matrices_go_in_stacks_of_limited_size_with_the_same_result(monkeypatch):
    monkeypatch.setattr(muon, "quick_dtype", lambda device: torch.float32)
    found = []
    for stack in (2**24, 60, 1):
        monkeypatch.setattr(muon, "STACK", stack)
        params = weights(0)
        for weight, gradient in zip(params, weights(1), strict=True):
            weight.grad = gradient.detach()
        Muon(params, lr=0.1).step()
        found.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_weights_without_gradients_rest_and_a_closure_gives_the_loss():
    moved, resting = (torch.nn.Parameter(torch.eye(3)) for _ in range(2))
    optimizer = Muon([moved, resting], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (moved * torch.arange(9.0).view(3, 3)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 12
    assert not torch.equal(moved, torch.eye(3)) and torch.equal(resting, torch.eye(3))


def test_bfloat16_is_for_processors_that_multiply_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert quick_dtype(torch.device("cpu")) == torch.float32
    assert quick_dtype(torch.device("mps")) == torch.bfloat16
