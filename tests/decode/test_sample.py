import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.sample import Draft, Noise, Sampling, SamplingError, choose, penalize, propose, redraw, warp
from mmtp.nn import native


def test_noise_is_a_function_of_seed_and_place() -> None:
    first = [Noise(7).at(p, 50) for p in range(3)]
    again = Noise(7)
    assert all(torch.equal(again.at(p, 50), first[p]) for p in (2, 0, 1))
    assert not torch.equal(Noise(8).at(0, 50), first[0])
    assert not torch.equal(first[0], first[1])


def test_noise_is_philox_with_the_place_as_counter() -> None:
    seed, noise = 2**63 + 5, Noise(2**63 + 5)
    for place, begun in ((7, 3), (2, 0), (40, 3), (7, 3)):
        fresh = np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, 0, place)))
        assert noise.at(place, 11).tolist() == (-np.log(fresh.standard_exponential(11, dtype=np.float32))).tolist()
        fresh = np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, 2, begun)))
        assert list(noise.uniforms(place, begun)) == fresh.random((place - begun + 1, 4))[-1].tolist()


def test_numbers_of_a_place_are_the_same_however_many_are_asked_for() -> None:
    one, other = Noise(3), Noise(3)
    far = one.uniforms(60, 10)
    near = [other.uniforms(place, 10) for place in range(10, 61)]
    assert near[-1] == far and near[:5] == [one.uniforms(place, 10) for place in range(10, 15)]
    assert len({number for numbers in near for number in numbers}) == 4 * len(near)
    assert one.uniforms(60, 11) != far


@pytest.fixture(params=["compiled", "by calls"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    assert native.usable()
    if request.param == "by calls":
        monkeypatch.setattr(native, "usable", lambda: False)
    return request.param


def tokens(drafts: list[Draft]) -> list[int]:
    return [draft.token for draft in drafts]


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    draws = 4000
    places = list(range(draws))
    picked = tokens(choose(logits.expand(draws, 5), Sampling(temperature=0.7), Noise(3), places))
    expected = (logits / 0.7).softmax(0) * draws
    counts = torch.bincount(torch.tensor(picked), minlength=5).float()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 18.47, f"chi-square {chi_square:.1f} with 4 degrees of freedom (p < 0.001 above 18.47)"


TARGET = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5])
DRAFTER = torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0, 1.5])
LAST = torch.tensor([-1.0, 1.0, 0.5, 2.0, 0.0, 1.0])


def chi_square(picked: list[int], probabilities: torch.Tensor) -> float:
    expected = probabilities * len(picked)
    counts = torch.bincount(torch.tensor(picked), minlength=len(expected)).float()
    possible = expected > 0
    assert not counts[~possible].any()
    return float(((counts - expected) ** 2 / expected)[possible].sum())


@pytest.mark.parametrize("drafts", ["sampled", "withheld", "certain", "kept"])
@pytest.mark.parametrize("settings_", [{}, {"temperature": 0.6, "top_k": 4}], ids=["all", "top-k"])
def test_rejection_keeps_the_distribution(settings_: dict, drafts: str, kernels: str) -> None:
    """Whatever the drafts are drawn from: another distribution, one without some of the ids, or none at all; and where a draft was itself
    kept from what had been drawn of a third.
    """
    draws, sampling = 3000, Sampling(verification="rejection", seed=11, **settings_)
    places, noise = list(range(2, draws + 2)), Noise(11)
    left = None
    if drafts == "certain":
        proposed = [Draft(place % 6) for place in places]
    else:
        if drafts == "kept":
            left = choose(LAST.expand(draws, 6), sampling, noise, places, begun=0)
        proposed = propose(DRAFTER.expand(draws, 6), sampling, noise, places, 1, (0, 2) if drafts == "withheld" else (), left)
        drawn = propose(DRAFTER.expand(draws, 6), sampling, noise, places, 2)
        assert tokens(drawn) != tokens(proposed)  # a place that is drafted again meets other noise
    wanted = warp(TARGET[None], sampling)[0].softmax(0)
    chosen = choose(TARGET.expand(draws, 6), sampling, noise, places, proposed, 1)
    picked = tokens(chosen)
    torch.testing.assert_close(torch.stack([each.probabilities for each in chosen]), wanted.expand(draws, 6))
    assert chi_square(picked, wanted) < 20.5  # 5 degrees of freedom: p < 0.001 above
    stood = sum(token == draft.token for token, draft in zip(picked, proposed, strict=True)) / draws
    if drafts in ("sampled", "kept"):
        q = warp(DRAFTER[None], sampling)[0].softmax(0)
        assert chi_square(tokens(proposed), q) < 20.5
        assert abs(stood - float(torch.minimum(wanted, q).sum())) < 0.03  # 1 - TV, the most there can be
        if left is not None:
            last = warp(LAST[None], sampling)[0].softmax(0)
            assert chi_square(tokens(left), last) < 20.5
            kept = sum(one == other for one, other in zip(tokens(left), tokens(proposed), strict=True)) / draws
            assert abs(kept - float(torch.minimum(last, q).sum())) < 0.03
    elif drafts == "certain":
        assert abs(stood - 1 / 6) < 0.03


def test_without_drafts_or_at_temperature_zero_rejection_is_coupling() -> None:
    logits, places = torch.randn(50, 9), list(range(50))
    for temperature in (0.0, 1.0):
        ways = [Sampling(temperature=temperature, verification=way) for way in ("coupling", "rejection")]
        assert len({tuple(tokens(choose(logits, sampling, Noise(0), places))) for sampling in ways}) == 1
    drafts = propose(torch.randn(50, 9), ways[1], Noise(0), places, 0)
    greedy = Sampling(temperature=0.0, verification="rejection")
    assert tokens(choose(logits, greedy, Noise(0), places, drafts, 0)) == logits.argmax(1).tolist()
    assert tokens(choose(logits, ways[1], Noise(0), places, drafts, 0)) != tokens(choose(logits, ways[1], Noise(0), places))
    # In a pass that judges drafts, what is chosen without one meets numbers of that pass.
    assert tokens(choose(logits, ways[1], Noise(0), places, begun=0)) != tokens(choose(logits, ways[1], Noise(0), places))


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


def test_min_p_keeps_what_is_probable_enough() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert warp(logits, Sampling(min_p=0.2)).isfinite().tolist() == [[True, True, True, False]]
    assert warp(logits, Sampling(min_p=0.2, temperature=0.5)).isfinite().tolist() == [[True, True, False, False]]
    assert warp(logits, Sampling(min_p=1.0)).isfinite().sum() == 1


def test_penalty_makes_what_stands_less_probable() -> None:
    seen = torch.tensor([[True, True, False]])
    assert penalize(torch.tensor([[2.0, -2.0, 2.0]]), seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]


def test_media_have_settings_of_their_own() -> None:
    sampling = Sampling(temperature=0.5, guidance=2.0, seed=3, per_modality={"image": {"top_k": 5, "guidance": 1.0, "guidance_end": 4.0}})
    assert sampling.of("text") == sampling
    assert sampling.of("image") == Sampling(temperature=0.5, top_k=5, guidance=1.0, guidance_end=4.0, seed=3)
    assert [sampling.of("image").weight(part) for part in (0.0, 0.5, 1.0)] == [1.0, 2.5, 4.0] and sampling.weight(1.0) == 2.0
    assert Sampling(per_modality={"image": {"guidance_end": 2.0}}).guided and not Sampling(per_modality={"audio": {"top_k": 1}}).guided


def test_temperature_zero_takes_the_greatest() -> None:
    logits = torch.randn(6, 9)
    assert tokens(choose(logits, Sampling(temperature=0.0), Noise(0), list(range(6)))) == logits.argmax(1).tolist()


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
        ({"min_p": 1.1}, "min_p 1.1"),
        ({"guidance_end": -2.0}, "guidance_end -2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"per_modality": {"picture": {}}}, "per_modality 'picture': one of text, image, audio, video"),
        ({"per_modality": {"image": {"seed": 1}}}, "image: 'seed' is not set per medium"),
        ({"per_modality": {"image": {"top_p": 0.0}}}, "image: top_p 0.0: a number above 0"),
        ({"verification": "typical"}, "verification 'typical': one of coupling, rejection"),
    ],
)
def test_refuses_settings_out_of_range(settings_: dict, words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        Sampling(**settings_)


def test_kernels_and_calls_draw_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts and without, such as were the only ones, and where rows have ids that cannot come."""
    generator = torch.Generator().manual_seed(0)
    scores, before = 2 * torch.randn(2, 400, 37, generator=generator)
    scores[:, 30:] = float("-inf")
    numbers = [(keep, draw) for keep, draw in torch.rand(400, 2, generator=generator).tolist()]
    drawn: list[Draft | None] = [Draft(i % 30, p) for i, p in enumerate(before.softmax(1))]
    drawn[::5] = [None] * 80
    drawn[1::5] = [Draft(i % 37) for i in range(80)]
    at_once = redraw(scores, drawn, numbers)
    monkeypatch.setattr(native, "usable", lambda: False)
    for one, other, p in zip(at_once, redraw(scores, drawn, numbers), scores.softmax(1), strict=True):
        assert one.token == other.token < 30
        torch.testing.assert_close(one.probabilities, p)
    kept = sum(draft is not None and draft.token == each.token for draft, each in zip(drawn, at_once, strict=True))
    assert 50 < kept < 300
    # Of the same distribution everything is kept.
    same = redraw(scores, [Draft(i % 30, p) for i, p in enumerate(scores.softmax(1))], numbers)
    assert tokens(same) == [i % 30 for i in range(400)]
