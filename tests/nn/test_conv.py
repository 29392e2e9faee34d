import pytest
import torch
from torch import nn

from mmtp.nn.conv import ChannelNorm, Conv, ResidualConv, reach


def test_channel_norm_sees_one_pixel_only():
    norm = ChannelNorm(8)
    x = torch.randn(2, 8, 5, 6)
    changed = x.clone()
    changed[:, :, 2, 3] += 7
    same = (norm(x) == norm(changed)).all(1)
    assert same.sum() == 2 * (5 * 6 - 1)
    assert norm(x).mean(1).abs().max() < 1e-5


def test_conv_keeps_the_size():
    x = torch.randn(1, 4, 8, 6)
    assert Conv(4, 5)(x).shape == Conv(4, 5, kernel=1)(x).shape == (1, 5, 8, 6)


def test_kernel_1_sees_one_pixel_only():
    conv = Conv(4, 5, kernel=1)
    x = torch.randn(1, 4, 8, 6)
    changed = x.clone()
    changed[..., 2, 3] += 7
    assert (conv(x) == conv(changed)).all(1).sum() == 8 * 6 - 1


def test_repeated_borders_keep_a_constant_constant():
    y = Conv(4, 5, padding_mode="replicate")(torch.ones(1, 4, 8, 6))
    assert (y - y[..., :1, :1]).abs().max() < 1e-6


def test_residual_block_starts_as_the_identity_and_can_learn():
    block = ResidualConv(6)
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(block(x), x)
    block(x).square().mean().backward()
    assert block.conv2.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kernel", [1, 3])
def test_reach_is_what_an_output_sees(kernel):
    """Not less, or tiles would be wrong; for whole cells not more, or they would be slow."""
    down = nn.Sequential(nn.PixelUnshuffle(2), Conv(4, 3), ResidualConv(3, kernel=kernel), nn.Conv2d(3, 3, 2, stride=2), Conv(3, 3))
    up = nn.Sequential(Conv(3, 3), ResidualConv(3, kernel=kernel), nn.PixelShuffle(1), Conv(3, 4), nn.PixelShuffle(2), Conv(1, 1))
    for network, channels, cell, inputs, wanted in ((down, 1, 1, 4, 6 + 4 * (kernel == 3)), (up, 3, 2, 1, 3 + 2 * (kernel == 3))):
        for parameter in network.parameters():
            nn.init.normal_(parameter)
        side, middle = 24 * inputs, 12
        x = torch.randn(1, channels, side, side, requires_grad=True)
        place = slice(middle * cell, (middle + 1) * cell)
        network(x)[..., place, place].square().sum().backward()
        touched = (x.grad[0] != 0).any(0).any(0).nonzero()[:, 0]
        assert middle * inputs - touched.min() == touched.max() - (middle + 1) * inputs + 1 == reach(network) == wanted
        assert reach(network, 4) == -(-wanted // 4)
