from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.nn.conv1d import Chain, ConvNeXtBlock, ResidualUnit, Snake, StepNorm, TimeConv, Upsample, reach


def network():
    return Chain(
        TimeConv(2, 6, 5, causal=True, dilation=3),
        ResidualUnit(6, 9, causal=True),
        Snake(6),
        TimeConv(6, 8, 8, causal=True, stride=4, weight_norm=True),
        StepNorm(8),
        ConvNeXtBlock(8, 5, scale=1.0, causal=True),
        Upsample(8, 3, 4, causal=True, weight_norm=True),
    ).eval()


@settings(deadline=None, max_examples=15)
@given(chunks=st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_chunks_with_a_state_give_what_the_whole_gives(chunks):
    torch.manual_seed(0)
    net, state = network(), {}
    x = torch.randn(2, 2, 4 * sum(chunks))
    with torch.no_grad():
        parts = torch.cat([net(part, state) for part in x.split([4 * n for n in chunks], -1)], -1)
        # 5e-7 is the worst seen, of values up to 3.
        torch.testing.assert_close(parts, net(x), rtol=0, atol=5e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_convolution_is_that_of_torch_with_zeros_around(causal):
    x = torch.randn(1, 3, 24)
    layer = TimeConv(3, 5, 8, causal=causal, stride=4)
    padding = (4, 0) if causal else (2, 2)
    expected = F.conv1d(F.pad(x, padding), layer.conv.weight, layer.conv.bias, stride=4)
    assert torch.equal(layer(x), expected)
    assert expected.shape == (1, 5, 6)


def test_uneven_kernels_keep_the_length():
    for kernel, stride in ((6, 3), (4, 1), (10, 5), (7, 2)):
        assert TimeConv(1, 1, kernel, causal=False, stride=stride)(torch.randn(1, 1, 30)).shape[-1] == 30 // stride


def test_weight_norm_starts_as_no_change_and_learns_length_apart_from_direction():
    x = torch.randn(1, 3, 24)
    layer = TimeConv(3, 5, 7, causal=True, weight_norm=True)
    plain = F.conv1d(F.pad(x, (6, 0)), layer.conv.weight, layer.conv.bias)
    torch.testing.assert_close(layer(x), plain)
    with torch.no_grad():
        layer.conv.weight.mul_(3)
        torch.testing.assert_close(layer(x), plain)
        layer.length.mul_(2)
        bias = layer.conv.bias[:, None]
        torch.testing.assert_close(layer(x), 2 * (plain - bias) + bias)


def test_causal_upsampling_is_a_transposed_convolution():
    layer = Upsample(3, 2, 4, causal=True)
    x = torch.randn(1, 3, 6)
    # Output channel and place in time come from one axis; the newer input stands last in a kernel, and first in a transposed one.
    weight = layer.conv.weight.detach().reshape(2, 4, 3, 2)
    transposed = torch.cat([weight[..., 1], weight[..., 0]], 1).permute(2, 0, 1)
    bias = layer.conv.bias.detach().reshape(2, 4).repeat(1, 6)
    expected = F.conv_transpose1d(x, transposed, stride=4)[..., : 6 * 4] + bias
    torch.testing.assert_close(layer(x), expected)


def test_snake_is_its_formula_also_where_alpha_is_nothing():
    snake, x = Snake(3), torch.randn(2, 3, 9)
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([[0.5], [-2.0], [0.0]]))
    y = snake(x)
    torch.testing.assert_close(y[:, 0], x[:, 0] + (0.5 * x[:, 0]).sin().square() / 0.5)
    torch.testing.assert_close(y[:, 1], x[:, 1] - (2 * x[:, 1]).sin().square() / 2)
    assert torch.equal(y[:, 2], x[:, 2])
    y.sum().backward()
    assert snake.alpha.grad.isfinite().all()


def test_step_norm_sees_one_step_only():
    norm, x = StepNorm(8), torch.randn(2, 8, 10)
    changed = x.clone()
    changed[:, :, 4] += torch.randn(2, 8)
    assert (norm(x) == norm(changed)).all(1).sum() == 2 * 9


def test_small_scale_is_near_the_identity():
    x = torch.randn(2, 8, 10)
    assert torch.equal(ConvNeXtBlock(8, 7, scale=0.0, causal=False)(x), x)
    assert not torch.allclose(ConvNeXtBlock(8, 7, scale=1.0, causal=False)(x), x)


@pytest.mark.parametrize("causal", [False, True])
def test_reach_is_measured_in_inputs(causal):
    layers = TimeConv(1, 1, 7, causal=causal), TimeConv(1, 1, 4, causal=causal, stride=2), TimeConv(1, 1, 3, causal=causal, dilation=2)
    assert layers[1].rate == Fraction(1, 2)
    net = Chain(*layers)
    before, after = (6 + 2 + 8, 0) if causal else (3 + 1 + 4, 3 + 1 + 4)
    assert reach(net) == (before, after)
    assert reach(net, 2) == (before // 2, after // 2)
    x = torch.randn(1, 1, 60, requires_grad=True)
    net(x)[0, 0, 15].backward()
    touched = x.grad[0, 0].nonzero()[:, 0]
    assert (touched.min(), touched.max()) == (30 - before, 31 + after)


def test_a_state_does_not_keep_the_chunk(monkeypatch):
    state = {}
    TimeConv(1, 1, 3, causal=True)(torch.randn(1, 1, 10_000), state)
    (past,) = state.values()
    assert past.untyped_storage().nbytes() == 2 * 4
