import pytest
import torch

from mmtp.config import ConfigError, build_config
from mmtp.models.heads.flow import TokenFlow


def learnt(config: TokenFlow.Config, vectors: torch.Tensor, states: torch.Tensor, steps: int) -> TokenFlow:
    torch.manual_seed(0)
    head = config.build(state_width=states.shape[1], vector_width=vectors.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        head.error(vectors, states).backward()
        optimizer.step()
    return head.eval()


def test_both_of_two_vectors_are_drawn_and_nothing_between() -> None:
    """State 0 leaves a choice of two vectors, state 1 has one. A regression would answer the mean of the two, which is neither."""
    modes = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, -2.0]])
    states = torch.eye(2)[[0, 0, 1]]
    head = learnt(TokenFlow.Config(width=48, depth=2, repeats=32, mean=1.5, std=1.5), modes, states, 300)
    torch.manual_seed(1)
    with torch.no_grad():
        drawn = head.sample(torch.eye(2)[:1].expand(100, -1), torch.randn(100, 2))
        single = head.sample(torch.eye(2)[1:].expand(20, -1), torch.randn(20, 2))
    distance = torch.cdist(drawn, modes)
    nearest = distance.argmin(1)
    assert (distance.amin(1) < 0.5).float().mean() > 0.9
    assert 25 < int((nearest == 0).sum()) < 75 and int((nearest == 2).sum()) == 0
    assert (torch.cdist(single, modes[2:]) < 0.5).float().mean() > 0.9
    mean = modes[:2].mean(0, keepdim=True)
    assert torch.cdist(mean, modes[:2]).amin() > 1.4


def test_an_untrained_head_says_nothing_and_costs_about_two() -> None:
    torch.manual_seed(0)
    head = TokenFlow.Config(width=16, depth=2).build(state_width=6, vector_width=4)
    vectors, states = torch.randn(2000, 4), torch.randn(2000, 6)
    assert not head(vectors, torch.rand(2000), states).any()
    assert float(head.error(vectors, states).detach()) == pytest.approx(2.0, abs=0.1)


def test_vectors_follow_noise_state_and_guidance_row_by_row() -> None:
    torch.manual_seed(0)
    head = TokenFlow.Config(width=16, depth=1, steps=4).build(state_width=6, vector_width=4)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states, guides, noise = torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, 4)
    with torch.no_grad():
        plain = head.sample(states, noise)
        torch.testing.assert_close(plain[1:2], head.sample(states[1:2], noise[1:2]))
        scale = torch.tensor([1.0, 3.0, 0.0])
        guided = head.sample(states, noise, guides, scale)
        torch.testing.assert_close(guided[0], plain[0])
        torch.testing.assert_close(guided[2], head.sample(guides, noise)[2])
        assert not torch.allclose(guided[1], plain[1])
        # Euler's steps by hand, one vector.
        x = noise[1:2]
        for step in range(4):
            time = torch.tensor([step / 4])
            c, u = head(x, time, states[1:2]), head(x, time, guides[1:2])
            x = x + (u + 3.0 * (c - u)) / 4
        torch.testing.assert_close(guided[1:2], x)


@pytest.mark.parametrize(("change", "message"), [({"steps": 0}, "steps 0"), ({"width": 7}, "width 7"), ({"std": 0.0}, "std 0.0")])
def test_settings_that_make_no_head_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("flow", {"type": "token", **change})
