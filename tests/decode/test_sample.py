import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.sample import Noise, Sampling, SamplingError, choose, warp


def test_noise_is_a_function_of_seed_and_place() -> None:
    first = [Noise(7).at(p, 50) for p in range(3)]
    again = Noise(7)
    assert all(torch.equal(again.at(p, 50), first[p]) for p in (2, 0, 1))
    assert not torch.equal(Noise(8).at(0, 50), first[0])
    assert not torch.equal(first[0], first[1])


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    draws = 4000
    places = list(range(draws))
    picked = choose(logits.expand(draws, 5), Sampling(temperature=0.7), Noise(3), places)
    expected = (logits / 0.7).softmax(0) * draws
    counts = torch.bincount(torch.tensor(picked), minlength=5).float()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 18.47, f"chi-square {chi_square:.1f} with 4 degrees of freedom (p < 0.001 above 18.47)"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.floats(0.05, 1.0), st.floats(0.1, 3.0), st.integers(0, 2**16))
def test_warp_keeps_the_most_probable(top_k: int, top_p: float, temperature: float, seed: int) -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(seed))
    kept = warp(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p)).isfinite()
    assert kept.gather(1, logits.argmax(1, keepdim=True)).all()
    assert (kept.sum(1) <= max(1, min(top_k, 10))).all()
    for row in range(4):
        if kept[row].any() and not kept[row].all():
            assert logits[row][kept[row]].min() >= logits[row][~kept[row]].max()
    only_p = warp(logits, Sampling(temperature=temperature, top_p=top_p)).isfinite()
    mass = ((logits / temperature).softmax(1) * only_p).sum(1)
    assert (mass >= top_p - 1e-5).all()


def test_temperature_zero_takes_the_greatest() -> None:
    logits = torch.randn(6, 9)
    assert choose(logits, Sampling(temperature=0.0), Noise(0), list(range(6))) == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"temperature": -0.1}, "temperature -0.1: a number from 0 up"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"guidance": math.inf}, "guidance inf"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_refuses_settings_out_of_range(settings_: dict, words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        Sampling(**settings_)
