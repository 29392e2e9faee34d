import pytest
import torch

from mmtp.nn.conv1d import Chain
from mmtp.nn.conv3d import CausalConv, Downsample, FactorisedResidual, FrameConv, Upsample

LAYERS = {
    "kernel-3": lambda: CausalConv(4, 6, 3),
    "stride-2": lambda: CausalConv(4, 6, 3, stride=2),
    "down": lambda: Downsample(4, 6, (4, 2)),
    "down-space": lambda: Downsample(4, 6, (1, 2)),
    "up": lambda: Upsample(4, 6, (4, 2)),
    "residual": lambda: FactorisedResidual(4),
    "chain": lambda: Chain(Downsample(4, 6, (2, 2)), torch.nn.SiLU(), Downsample(6, 6, (2, 1)), Upsample(6, 4, (4, 2))),
}
STEP = {"stride-2": 2, "down": 4, "chain": 4}
RATE = {"stride-2": 0.5, "down": 0.25, "up": 4}


@pytest.fixture(params=LAYERS)
def case(request):
    torch.manual_seed(0)
    layer = LAYERS[request.param]()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval(), STEP.get(request.param, 1), RATE.get(request.param, 1)


def test_the_first_frame_stands_alone_and_so_does_every_past(case):
    layer, step, rate = case
    x = torch.randn(2, 4, 1 + 3 * step, 4, 6)
    changed = x.clone()
    changed[:, :, 1 + step :] += 1
    before, after = layer(x), layer(changed)
    assert before.shape[2] == 1 + 3 * step * rate
    kept = int(1 + step * rate)
    assert torch.equal(before[:, :, :kept], after[:, :, :kept])
    assert not torch.equal(before[:, :, kept:], after[:, :, kept:])
    torch.testing.assert_close(layer(x[:, :, :1]), before[:, :, :1])


def test_chunks_are_the_whole(case):
    layer, step, _ = case
    x, state = torch.randn(2, 4, 1 + 5 * step, 4, 6), {}
    parts = [layer(x[:, :, :1], state)]
    for first, stop in ((0, 1), (1, 3), (3, 5)):
        parts.append(layer(x[:, :, 1 + first * step : 1 + stop * step], state))
    torch.testing.assert_close(torch.cat(parts, 2), layer(x), rtol=1e-5, atol=1e-5)


def test_a_still_video_stays_still(case):
    layer, step, _ = case
    y = layer(torch.randn(1, 4, 1, 4, 6).expand(-1, -1, 1 + 3 * step, -1, -1))
    if not isinstance(layer, Upsample | Chain):  # these deal out channels over time
        torch.testing.assert_close(y, y[:, :, :1].expand_as(y))


def test_a_frame_convolution_is_that_of_each_frame():
    layer, x = FrameConv(3, 5, 3), torch.randn(2, 3, 4, 6, 8)
    for i in range(4):
        wanted = torch.nn.functional.conv2d(x[:, :, i], layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(layer(x)[:, :, i], wanted, rtol=1e-5, atol=1e-5)


def test_a_causal_convolution_is_one_over_a_volume():
    layer, x = CausalConv(3, 5, 3, stride=2), torch.randn(2, 3, 5, 4, 6)
    before = torch.cat([x[:, :, :1], x[:, :, :1], x], 2)
    wanted = torch.nn.functional.conv3d(before, layer.conv.weight[..., None], layer.conv.bias, stride=(2, 1, 1))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
