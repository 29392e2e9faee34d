import pytest
import torch

from mmtp.train.losses.perceptual import PerceptualConfig, PerceptualLoss
from mmtp.train.losses.reconstruction import PictureReconstructionLoss, ReconstructionConfig


def test_weighted_sum_and_psnr():
    target = torch.zeros(2, 3, 4, 4)
    loss, metrics = PictureReconstructionLoss(ReconstructionConfig(l1=0.5, l2=1.0))(target + 0.2, target)
    assert loss.item() == pytest.approx(0.5 * 0.2 + 0.04)
    assert metrics["l1"] == pytest.approx(0.2)
    assert metrics["psnr"] == pytest.approx(20.0, abs=1e-3)  # 0.2 of a range of 2


def test_gradient_reaches_the_output():
    output = torch.rand(1, 3, 4, 4, requires_grad=True)
    loss, _ = PictureReconstructionLoss(ReconstructionConfig())(output, torch.zeros(1, 3, 4, 4))
    loss.backward()
    assert (output.grad != 0).all()


def test_a_perceptual_part_comes_with_its_weight():
    perceptual = PerceptualLoss(PerceptualConfig(layers=(0,), weight=2.0, size=0), lambda x: [x])
    output, target = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    loss, metrics = PictureReconstructionLoss(ReconstructionConfig(l1=0.0, l2=0.0), perceptual)(output, target)
    assert loss.item() == pytest.approx(2 * metrics["perceptual"]) and metrics["perceptual"] > 0
