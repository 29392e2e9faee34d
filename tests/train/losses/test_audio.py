import math

import pytest
import torch

from mmtp.config import ConfigError, from_dict
from mmtp.train.losses.audio import AudioReconstructionConfig, AudioReconstructionLoss, magnitudes, si_sdr

RATE = 16000


def tone(hertz, samples=4000, loudness=0.5):
    return loudness * torch.sin(2 * math.pi * hertz / RATE * torch.arange(samples, dtype=torch.float32))[None, None]


@pytest.fixture
def loss():
    return AudioReconstructionLoss(AudioReconstructionConfig(), RATE)


def test_the_original_is_without_loss(loss):
    total, metrics = loss(tone(440), tone(440))
    assert total == 0
    assert metrics == {"mel": 0.0, "l1": 0.0, "si_sdr": 100.0}


def test_weighted_sum():
    loss = AudioReconstructionLoss(AudioReconstructionConfig(mel=2.0, l1=3.0), RATE)
    output, target = tone(440), tone(440, loudness=0.4)
    total, metrics = loss(output, target)
    assert metrics["l1"] == pytest.approx((output - target).abs().mean().item())
    assert total.item() == pytest.approx(2 * metrics["mel"] + 3 * metrics["l1"], rel=1e-5)


def test_a_tenth_of_the_loudness_is_one_per_scale_wherever_all_bands_sound(loss):
    noise = torch.rand(2, 1, 4000) * 2 - 1
    assert loss.mel(noise * 0.1, noise).item() == pytest.approx(7.0, abs=1e-3)


def test_mel_hears_pitch_and_not_phase(loss):
    target = tone(440)
    shifted = tone(440, 4010)[..., 10:]
    near, far = loss.mel(shifted, target), loss.mel(tone(880), target)
    assert near < 0.2 * far
    assert (shifted - target).abs().mean() > 0.3


def test_every_band_of_every_scale_hears_something():
    for rate in (16000, 24000):
        loss = AudioReconstructionLoss(AudioReconstructionConfig(), rate)
        for window, bands in zip(loss.config.windows, loss.config.bands, strict=True):
            bank = getattr(loss, f"bank_{window}")
            assert bank.shape == (window // 2 + 1, bands)
            assert (bank.sum(0) > 0).all()


def test_gradients_are_finite_also_at_silence_and_under_autocast(loss):
    for target in (torch.zeros(1, 1, 1000), tone(440, 1000)):
        output = torch.zeros(1, 1, 1000, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            total, _ = loss(output + 1e-9, target)
        total.backward()
        assert total.dtype == torch.float32
        assert output.grad.isfinite().all()


def test_loss_falls_when_followed(loss):
    target = tone(440, 800)
    output = (torch.rand(1, 1, 800) * 0.1).requires_grad_()
    first = loss(output, target)[0].item()
    for _ in range(30):
        total, _ = loss(output, target)
        (gradient,) = torch.autograd.grad(total, output)
        output.data -= 0.03 * gradient.sign()
    assert total.item() < 0.9 * first


def test_nothing_is_saved_with_a_loss(loss):
    assert loss.state_dict() == {}


def test_short_sounds_have_spectra():
    assert magnitudes(torch.ones(1, 1, 3), torch.hann_window(64)).shape == (1, 33, 1)


def test_si_sdr_does_not_mind_loudness():
    target = torch.randn(3, 1, 1000)
    noise = torch.randn(3, 1, 1000)
    for loudness in (0.1, 1.0, 7.0):
        assert si_sdr(loudness * (target + 0.1 * noise), target).mean().item() == pytest.approx(20, abs=0.5)
    assert si_sdr(torch.zeros(1, 1, 10), torch.zeros(1, 1, 10)).isfinite().all()


def test_scales_must_match():
    with pytest.raises(ConfigError, match="windows and bands must have one entry per scale"):
        from_dict(AudioReconstructionConfig, {"windows": [32], "bands": [5, 10]}, "loss")
