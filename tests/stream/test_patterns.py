"""Interleaving loses nothing and follows its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.stream.patterns import Pattern, PatternError

DELAYS = st.lists(st.integers(0, 6), max_size=4).map(lambda d: (0, *d))
QUICK = settings(max_examples=100, deadline=None)


@QUICK
@given(DELAYS, st.integers(0, 9), st.integers(1, 3))
def test_deinterleave_inverts_interleave(delays, frames, batch):
    pattern = Pattern(delays)
    codes = torch.arange(batch * len(delays) * frames).reshape(batch, len(delays), frames)
    stream = pattern.interleave(codes)
    assert stream.shape == (batch, len(delays) * frames)
    assert torch.equal(pattern.deinterleave(stream), codes)
    assert torch.equal(pattern.interleave(pattern.deinterleave(stream)), stream)


@QUICK
@given(DELAYS, st.integers(0, 9))
def test_order_follows_the_definition(delays, frames):
    wanted = [(s - d, k, s) for s in range(frames + max(delays)) for k, d in enumerate(delays) if 0 <= s - d < frames]
    frame, codebook, step = Pattern(delays).order(frames)
    assert list(zip(frame.tolist(), codebook.tolist(), step.tolist(), strict=True)) == wanted


@QUICK
@given(DELAYS, st.integers(1, 12))
def test_the_first_code_after_the_last_whole_step_tells_the_end(delays, frames):
    pattern = Pattern(delays)
    _, codebook, step = pattern.order(frames)
    after = codebook[step >= frames]
    told = pattern.ramp_down_starts[min(frames, len(pattern.ramp_down_starts)) - 1]
    assert told == (after[0] if len(after) else 0)


def test_the_delay_pattern_in_full():
    frame, codebook, step = Pattern((0, 1, 2)).order(2)
    assert frame.tolist() == [0, 1, 0, 1, 0, 1]
    assert codebook.tolist() == [0, 0, 1, 1, 2, 2]
    assert step.tolist() == [0, 1, 1, 2, 2, 3]


def test_an_order_cannot_be_written_to():
    frame, _, _ = Pattern((0, 1)).order(3)
    with pytest.raises(ValueError, match="read-only"):
        frame[0] = 5
    np.testing.assert_array_equal(Pattern((0, 1)).order(3)[0], frame)


@pytest.mark.parametrize("delays", [(), (1,), (1, 0), (0, -1)])
def test_delays_start_at_0(delays):
    with pytest.raises(PatternError, match="one delay of at least 0 per codebook"):
        Pattern(delays)


def test_codes_that_do_not_fit_are_refused():
    pattern = Pattern((0, 1))
    with pytest.raises(PatternError, match="codes of 3 codebooks given to a pattern of 2"):
        pattern.interleave(torch.zeros(1, 3, 4, dtype=torch.int64))
    with pytest.raises(PatternError, match="5 codes are not whole frames of 2 codebooks"):
        pattern.deinterleave(torch.zeros(1, 5, dtype=torch.int64))
