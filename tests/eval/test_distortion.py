import math

import pytest
import torch
import torchaudio

from mmtp.eval import distortion
from mmtp.eval.distortion import Distortions, NotInstalled, Undefined, fit, mel_distance, pesq, si_sdr, stft_distance, stoi
from mmtp.testing.voice import RATE, voice


def noise(sound: torch.Tensor, seed: int = 1) -> torch.Tensor:
    return torch.randn(sound.shape, generator=torch.Generator().manual_seed(seed))


def without_voice(error: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
    """The part of an error that has no mean and nothing in common with the sound."""
    error, sound = error.double() - error.double().mean(), sound.double() - sound.double().mean()
    return error - (error * sound).sum() / sound.square().sum() * sound


@pytest.mark.parametrize("decibels", [-5.0, 0.0, 20.0])
def test_si_sdr_of_a_known_error(decibels):
    target = voice()
    error = without_voice(noise(target), target)
    power = (target.double() - target.double().mean()).square().sum()
    error = error * (power / error.square().sum() / 10 ** (decibels / 10)).sqrt()
    assert si_sdr(target + error, target, RATE) == pytest.approx(decibels, abs=1e-4)
    assert si_sdr(0.3 * (target + error) + 0.1, target, RATE) == pytest.approx(decibels, abs=1e-4)


def test_si_sdr_at_its_ends():
    target = voice()
    assert si_sdr(0.5 * target, target, RATE) == 100.0
    assert si_sdr(without_voice(noise(target), target), target, RATE) == -100.0


def test_distances_of_equal_sounds_are_zero_and_grow_with_the_error():
    target = voice(0.7)
    for distance in (mel_distance, stft_distance):
        small, large = (distance(target + scale * noise(target), target, RATE) for scale in (0.003, 0.03))
        assert 0.05 < small < large
        assert distance(target, target, RATE) == 0.0


def test_mel_distance_is_that_of_torchaudios_spectra():
    target = voice(0.5)
    output = target + 0.01 * noise(target)
    expected = 0.0
    for window, bands in ((2048, 150), (512, 80)):
        mel = torchaudio.transforms.MelSpectrogram(
            RATE, window, hop_length=window // 4, n_mels=bands, power=1.0, norm="slaney", mel_scale="slaney", pad_mode="constant"
        )
        a, b = mel(output), mel(target)
        expected += (a - b).abs().mean() + (a.square().clamp(1e-5).log10() - b.square().clamp(1e-5).log10()).abs().mean()
    assert mel_distance(output, target, RATE) == pytest.approx(float(expected), rel=1e-3)


def test_stft_distance_of_a_louder_sound():
    # Ten times the amplitude is 2 in the logarithm of power, wherever both stand above the floor, in either window.
    target = noise(torch.zeros(1, 8192)) * 0.01
    magnitude = stft_distance(10 * target, target, RATE) - 4
    spectra = (torch.stft(target[0], w, w // 4, window=torch.hann_window(w), pad_mode="constant", return_complex=True) for w in (2048, 512))
    assert magnitude == pytest.approx(sum(9 * float(s.abs().mean()) for s in spectra), abs=0.02)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_distances_take_any_rate_and_length(rate):
    for samples in (1, 600):
        assert mel_distance(torch.full((1, samples), 0.5), torch.zeros(1, samples), rate) > 0
        assert stft_distance(torch.zeros(1, samples), torch.zeros(1, samples), rate) == 0


def test_stoi_is_the_packages_and_falls_with_noise():
    package = pytest.importorskip("pystoi")
    target = voice()
    output = target + 0.1 * noise(target)
    assert stoi(output, target, RATE) == pytest.approx(package.stoi(target[0].numpy(), output[0].numpy(), RATE), abs=1e-6)
    assert stoi(target, target, RATE) == pytest.approx(1.0, abs=1e-6)
    assert stoi(target + noise(target), target, RATE) < stoi(output, target, RATE) < 0.98
    assert stoi(torch.zeros_like(target), target, RATE) == pytest.approx(0.0, abs=1e-6)


def test_pesq_is_the_packages_at_16_khz():
    package = pytest.importorskip("pesq")
    target = voice()
    output = target + 0.05 * noise(target)
    assert pesq(output, target, RATE) == pytest.approx(package.pesq(RATE, target[0].numpy(), output[0].numpy(), "wb"), abs=1e-4)
    assert pesq(target, target, RATE) == pytest.approx(4.64, abs=0.01)
    assert pesq(voice(rate=24000), voice(rate=24000), 24000) == pytest.approx(4.64, abs=0.01)


@pytest.mark.parametrize(
    ("measure", "needs", "output", "target", "why"),
    [
        (si_sdr, "torch", voice(0.5), torch.zeros(1, 8000), "the original is silent"),
        (si_sdr, "torch", torch.full((1, 8000), 0.2), voice(0.5), "the reconstruction is silent"),
        (stoi, "pystoi", voice(0.5), torch.zeros(1, 8000), "the original is silent"),
        (stoi, "pystoi", voice(0.3), voice(0.3), "under 0.4 s"),
        (stoi, "pystoi", *[torch.cat([voice(0.3), torch.zeros(1, 16000)], 1)] * 2, "under 0.4 s that are not silent"),
        (pesq, "pesq", voice(0.5), torch.zeros(1, 8000), "the original is silent"),
        (pesq, "pesq", torch.zeros(1, 8000), voice(0.5), "the reconstruction is silent"),
        (pesq, "pesq", voice(0.2), voice(0.2), "under 0.25 s"),
        (pesq, "pesq", torch.rand(1, 61), torch.rand(1, 61), "over 60 s"),
    ],
)
def test_what_has_no_value_is_said(measure, needs, output, target, why):
    pytest.importorskip(needs)
    with pytest.raises(Undefined, match=f"^{why}$"):
        measure(output, target, 1 if why == "over 60 s" else RATE)


def test_means_leave_out_and_count(monkeypatch):
    monkeypatch.setattr(distortion, "MEASURES", [m for m in distortion.MEASURES if m.name in ("mel", "si_sdr")])
    distortions = Distortions()
    target = voice(0.5)
    output = target + 0.01 * noise(target)
    distortions.add(output, target, RATE)
    distortions.add(output, torch.zeros_like(target), RATE)
    distortions.add(torch.zeros_like(target), torch.zeros_like(target), RATE)
    assert distortions.means["si_sdr"] == si_sdr(output, target, RATE)
    assert distortions.left_out["si_sdr"] == {"the original is silent": 2}
    assert distortions.remark("si_sdr") == "2 left out: the original is silent"
    assert distortions.remark("mel") == "" and math.isfinite(distortions.means["mel"])


def test_what_is_not_installed_is_said_once(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(distortion, "import_module", missing)
    with pytest.raises(NotInstalled, match=r"pip install 'mmtp\[pesq\]'"):
        pesq(voice(0.5), voice(0.5), RATE)
    distortions = Distortions()
    distortions.add(voice(0.5), voice(0.5), RATE)
    assert distortions.means["stoi"] is None and not distortions.left_out["stoi"]
    assert distortions.remark("stoi") == "not installed: pip install 'mmtp[audio-eval]'"


def test_sounds_are_brought_to_a_length():
    assert fit(torch.ones(1, 3), 5).tolist() == [[1, 1, 1, 0, 0]]
    assert fit(torch.ones(1, 3), 2).tolist() == [[1, 1]]
