import math

import pytest
import torch
import torch.nn.functional as F

from mmtp.config import ConfigError, from_dict
from mmtp.train.losses.contrast import Contrast, ContrastConfig, clip_loss, siglip_loss

SMALL = {"width": 32, "depth": 1, "dim": 16}


@pytest.fixture(scope="module")
def logits():
    return 3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0))


def test_clip_is_symmetric_cross_entropy(logits):
    """CLIP, figure 3."""
    labels = torch.arange(5)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(clip_loss(logits, torch.eye(5, dtype=torch.bool)), expected)


def test_clip_of_equal_captions_shares_the_target(logits):
    same = torch.eye(5, dtype=torch.bool)
    same[1, 3] = same[3, 1] = True
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    total = sum((1 if i not in (1, 3) else 0.5) * (rows[i, j] + columns[i, j]) for i in range(5) for j in range(5) if same[i, j])
    torch.testing.assert_close(clip_loss(logits, same), -total / 10)


def test_siglip_is_a_sigmoid_per_pair(logits):
    """SigLIP, section 3.2: -1/B sum_ij log sigmoid(z_ij (t x.y + b))."""
    same = torch.eye(5, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    expected = -sum(math.log(1 / (1 + math.exp(-float(logits[i, j]) * (1 if same[i, j] else -1)))) for i in range(5) for j in range(5)) / 5
    assert siglip_loss(logits, same).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("loss", "scale", "bias"), [("clip", 1 / 0.07, 0.0), ("siglip", 10.0, -10.0)])
def test_scale_and_bias_start_as_in_the_papers_and_learn(loss, scale, bias):
    torch.manual_seed(0)
    config = from_dict(ContrastConfig, {"loss": loss, **SMALL}, "loss.contrast")
    contrast = Contrast(config, config.towers(8))
    assert contrast.log_scale.exp().item() == pytest.approx(scale) and contrast.bias.item() == bias
    values = torch.randn(6, 4, 8, requires_grad=True)
    captions = ["a red circle", "a dog", "", "a red circle", "Ünïcode 漢字", "x" * 500]
    total, metrics = contrast(values, captions)
    total.backward()
    assert total.item() == pytest.approx(metrics["contrast"]) and 0 <= metrics["contrast.accuracy"] <= 1
    assert contrast.log_scale.grad.abs() > 0 and (contrast.bias.grad is not None) == (loss == "siglip")
    assert values.grad[2].abs().sum() == 0 and (values.grad[[0, 1, 3, 4, 5]].abs().sum((1, 2)) > 0).all()
    with torch.no_grad():
        contrast.log_scale.fill_(9.0)
    assert contrast(values, captions)[1]["contrast.scale"] == pytest.approx(100)


def test_a_batch_of_which_nothing_is_said_teaches_nothing():
    config = from_dict(ContrastConfig, SMALL, "loss.contrast")
    total, metrics = Contrast(config, config.towers(8))(torch.randn(2, 4, 8, requires_grad=True), ["", ""])
    total.backward()
    assert total == 0 and metrics == {}


def test_pairs_can_be_learnt():
    torch.manual_seed(0)
    config = from_dict(ContrastConfig, SMALL, "loss.contrast")
    contrast = Contrast(config, config.towers(8))
    values, captions = torch.randn(8, 4, 8), [f"number {i}" for i in range(8)]
    optimizer = torch.optim.AdamW(contrast.parameters(), lr=1e-2)
    first = contrast(values, captions)[1]
    for _ in range(40):
        loss, last = contrast(values, captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first["contrast.accuracy"] < 0.6 < 0.9 < last["contrast.accuracy"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "triplet"}, "'triplet' is not one of 'clip', 'siglip'"),
        ({"weight": 0.0}, "weight 0: above 0"),
    ],
)
def test_settings_that_are_none(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(ContrastConfig, values, "loss.contrast")
