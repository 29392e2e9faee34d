import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtp.config import from_dict
from mmtp.data.teacher_cache import CacheRecord
from mmtp.train.losses.distill import Statistics
from mmtp.train.losses.teachers import (
    LIMIT,
    FeatureReader,
    ImageTeacherConfig,
    TeacherBalance,
    TeachersConfig,
    factors,
    feature_statistics,
    with_gradient,
)
from mmtp.train.losses.terms import Term

BOTH = {"image": {"teacher": "eye"}, "text": {"teacher": "tongue"}}


def balance(**changes: object) -> TeacherBalance:
    return TeacherBalance(from_dict(TeachersConfig, BOTH | changes, "loss.distill"), ["image", "text"])


def terms(states: torch.Tensor, image: float, text: float, weights: tuple[float, float] = (1.0, 1.0)) -> dict[str, Term]:
    return {"image": Term(weights[0], image * states[0].square().sum()), "text": Term(weights[1], text * states[1].square().sum())}


def test_losses_are_one_whatever_their_unit_and_fall_after_the_reference() -> None:
    module, states = balance(reference=2), torch.ones(2, 3, requires_grad=True)
    for image, text, wanted in [(3000, 0.03, 2.0), (3000, 0.03, 2.0), (1500, 0.015, 1.0), (1500, 0.03, 1.5)]:
        total, _, numbers = module(terms(states, image / 3, text / 3), states)
        assert total == pytest.approx(wanted, rel=1e-5)
        assert numbers["distill.image"] == pytest.approx(image) and numbers["distill.text"] == pytest.approx(text)
    assert numbers["distill.ratio"] == pytest.approx(0.5)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_no_gradient_is_more_than_twice_the_other(image: float, text: float) -> None:
    found = factors({"image": image, "text": text})
    ratio = found["image"] * image / (found["text"] * text)
    assert 1 / LIMIT * (1 - 1e-6) <= ratio <= LIMIT * (1 + 1e-6)
    assert max(found.values()) == 1.0
    if 1 / LIMIT <= image / text <= LIMIT:
        assert set(found.values()) == {1.0}


def test_one_that_says_nothing_does_not_silence_the_other() -> None:
    assert factors({"image": 0.0, "text": 3.0}) == {"image": 1.0, "text": 1.0}
    assert factors({"text": 3.0}) == {"text": 1.0}


def test_the_gradient_at_the_states_is_clamped() -> None:
    module, states = balance(), torch.ones(2, 3, requires_grad=True)
    _, (gradient,), numbers = module(terms(states, 1.0, 1.0, weights=(50.0, 1.0)), states)
    assert numbers["distill.ratio"] == pytest.approx(50)
    image, text = gradient.norm(dim=1)
    assert (image / text).item() == pytest.approx(LIMIT, rel=1e-5)
    assert text.item() == pytest.approx(numbers["distill.text.grad"], rel=1e-5)


def test_gradients_are_those_of_the_sum() -> None:
    states, weight = torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True)

    def losses() -> dict[str, Term]:
        return {"image": Term(1.0, states[0].square().sum()), "text": Term(0.7, (states[1] * weight).square().sum())}

    value, gradients, numbers = balance()(losses(), states, weight)
    found = losses()
    scales = factors({name: numbers[f"distill.{name}.grad"] for name in found})
    total = sum(scales[name] * term.weight * term.value / term.value.item() for name, term in found.items())
    assert value == pytest.approx(total.item())
    for ours, theirs in zip(gradients, torch.autograd.grad(total, (states, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)
    carrier = with_gradient(value, (states, weight), gradients)
    assert carrier.item() == pytest.approx(value)
    for ours, theirs in zip(torch.autograd.grad(carrier, (states, weight)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_means_are_state() -> None:
    first, second, states = balance(), balance(), torch.ones(2, 3, requires_grad=True)
    for scale in (1.0, 0.5):
        first(terms(states, scale, scale), states)
    fresh = second(terms(states, 0.2, 0.3), states).value
    second.load_state_dict(first.state_dict())
    again = [module(terms(states, 0.2, 0.3), states).value for module in (first, second)]
    assert again[0] == again[1] != fresh


def test_features_are_read_at_unit_variance() -> None:
    features = 30 + 5 * torch.randn(400, 4)
    flat = features.double()
    records = [
        CacheRecord(i, "", 0, 1, len(part), len(part), part.sum(0).tolist(), part.square().sum(0).tolist())
        for i, part in enumerate(flat.split(150))
    ]
    found = feature_statistics([*records, CacheRecord(9, "", 0, 0, 0, 0)], 4)
    torch.testing.assert_close(found, Statistics.of(features[None]), rtol=1e-5, atol=1e-5)
    reader = FeatureReader(ImageTeacherConfig(teacher="eye"), 6, found)
    reader.adapter = torch.nn.Linear(4, 4)
    torch.nn.init.eye_(reader.adapter.weight)
    torch.nn.init.zeros_(reader.adapter.bias)
    error, cosine = reader((features - found.mean) / found.std, features)
    assert error.item() < 1e-6 and cosine.item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "give \\[loss.distill.image\\], \\[loss.distill.text\\], or both"),
        ({"text": {"teacher": "x", "beta": 1.0}}, "beta 1: more than 0, and between 0 and 1, are wanted"),
        ({"image": {"teacher": "x", "cosin": 1.0}}, "loss.distill.image: unknown key 'cosin'; did you mean 'cosine'"),
        ({"image": {"teacher": "x", "cosine": 0.0, "smooth_l1": 0.0}}, "at least 0, and one of them above it"),
        (BOTH | {"reference": 0}, "reference 0"),
    ],
)
def test_wrong_values_are_named(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_dict(TeachersConfig, values, "loss.distill")
