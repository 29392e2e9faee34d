import torch

from mmtp.nn.conv import ChannelNorm, Conv, ResidualConv


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
