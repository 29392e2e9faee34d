import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.nn.stft import Analysis, Extend, Synthesis, check_window


class Given(torch.nn.Module):
    """In place of a synthesis' linear layer: what that would have to give."""

    def forward(self, x):
        return x


def spectra(sound, window, hop, causal):
    """Log magnitude and phase of every frame, also of those that Extend adds, ``[1, window + 2, n]``."""
    before, after = Extend(window, hop, causal=causal).padding
    around = torch.nn.functional.pad(sound, (before * hop, after * hop))
    placed = torch.nn.functional.pad(around, Analysis(window, hop, causal=causal).padding)
    spectrum = torch.fft.rfft(placed[:, 0].unfold(-1, window, hop) * torch.hann_window(window))
    return torch.cat([spectrum.abs().clamp_min(1e-12).log(), spectrum.angle()], -1).transpose(1, 2)


@settings(deadline=None, max_examples=30)
@given(hops=st.integers(2, 6), half=st.integers(1, 10), frames=st.integers(1, 12), causal=st.booleans())
def test_synthesis_undoes_the_transform_up_to_the_ends(hops, half, frames, causal):
    hop = 2 * half
    window = hops * hop
    check_window(window, hop)
    synthesis = Synthesis(1, window, hop, causal=causal)
    synthesis.linear = Given()
    sound = torch.rand(1, 1, frames * hop) * 2 - 1
    torch.testing.assert_close(synthesis(spectra(sound, window, hop, causal)), sound, rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_features_are_those_of_the_spectrum(causal):
    analysis = Analysis(16, 4, causal=causal)
    # 2 periods of a window: all in bin 2, and half of that in each bin beside it, as the window spreads it.
    sound = torch.sin(2 * math.pi * 2 / 16 * torch.arange(80.0))[None, None]
    features = analysis(sound)
    assert features.shape == (1, analysis.channels, 20) == (1, 27, 20)
    log, real, imaginary = features[0, :, 8].split(9)
    torch.testing.assert_close(log[[1, 2, 3]].exp(), torch.tensor([2.0, 4.0, 2.0]))
    torch.testing.assert_close((real.square() + imaginary.square()).sqrt()[[1, 2, 3]], torch.tensor([2.0, 4.0, 2.0]) ** 0.3)


def test_a_frame_ends_with_its_window_where_causal_and_lies_in_the_middle_otherwise():
    for causal, first, last in ((True, 28, 44), (False, 34, 50)):
        sound = torch.zeros(1, 1, 80, requires_grad=True)
        (Analysis(16, 4, causal=causal)(sound + 0.1)[0, :, 10]).square().sum().backward()
        touched = sound.grad[0, 0].nonzero()[:, 0]
        # The Hann window is 0 at its first sample.
        assert (touched.min(), touched.max() + 1) == (first + 1, last)


def test_silence_is_finite_both_ways():
    features = Analysis(16, 4, causal=False)(torch.zeros(1, 1, 40))
    assert features.isfinite().all()
    synthesis = Synthesis(2, 16, 4, causal=True)
    with torch.no_grad():
        synthesis.linear.weight.fill_(100)
    loud = torch.full((1, 2, 8), 50.0, requires_grad=True)
    sound = synthesis(loud)
    assert sound.isfinite().all() and sound.abs().max() <= 16 * 16
    sound.square().sum().backward()
    assert loud.grad.isfinite().all()


@settings(deadline=None, max_examples=15)
@given(chunks=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_streams_give_what_the_whole_gives(chunks):
    torch.manual_seed(1)
    analysis, extend, synthesis = (Analysis(16, 4, causal=True), Extend(16, 4, causal=True), Synthesis(27, 16, 4, causal=True))
    synthesis.linear = Given()
    sound, state = torch.randn(1, 1, 4 * sum(chunks)), {}
    with torch.no_grad():
        features = torch.cat([analysis(part, state) for part in sound.split([4 * n for n in chunks], -1)], -1)
        torch.testing.assert_close(features, analysis(sound), rtol=0, atol=1e-5)
        frames = extend(features[:, :18])
        parts = [synthesis(extend(part, state), state) for part in frames.split([*chunks, 3], -1)]
        torch.testing.assert_close(torch.cat(parts, -1), synthesis(frames), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("window", "hop"), [(16, 16), (18, 4), (12, 3), (0, 0), (16, -4)])
def test_windows_that_do_not_add_up_are_refused(window, hop):
    with pytest.raises(ValueError, match=f"window {window} with hop {hop}: a window of at least 2 whole hops"):
        check_window(window, hop)
