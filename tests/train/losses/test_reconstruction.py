import pytest
import torch

from mmtp.train.losses.reconstruction import ReconstructionConfig, reconstruction_loss


def test_weighted_sum_and_psnr():
    target = torch.zeros(2, 3, 4, 4)
    loss, metrics = reconstruction_loss(target + 0.2, target, ReconstructionConfig(l1=0.5, l2=1.0))
    assert loss.item() == pytest.approx(0.5 * 0.2 + 0.04)
    assert metrics["l1"] == pytest.approx(0.2)
    assert metrics["psnr"] == pytest.approx(20.0, abs=1e-3)  # 0.2 of a range of 2


def test_gradient_reaches_the_output():
    output = torch.rand(1, 3, 4, 4, requires_grad=True)
    loss, _ = reconstruction_loss(output, torch.zeros(1, 3, 4, 4), ReconstructionConfig())
    loss.backward()
    assert (output.grad != 0).all()
