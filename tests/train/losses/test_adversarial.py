import pytest
import torch

from mmtp.train.losses.adversarial import (
    AdversarialConfig,
    Adversary,
    adaptive_weight,
    discriminator_loss,
    feature_loss,
    generator_loss,
    lecam_loss,
)
from mmtp.train.losses.discriminators import Judgement, PatchConfig, PatchDiscriminator


def judgement(score, *features):
    return Judgement(torch.full((1, 1, 2, 2), score), tuple(torch.full((1, 1, 2, 2), f) for f in features))


def test_hinge_losses_are_their_formula():
    real, fake = [judgement(0.5), judgement(3.0)], [judgement(-0.25), judgement(-2.0)]
    assert discriminator_loss(real, fake).item() == pytest.approx(((0.5 + 0.75) + (0 + 0)) / 2)
    assert generator_loss(fake).item() == pytest.approx((1.25 + 3) / 2)


def test_feature_loss_is_relative_to_the_original():
    real, fake = [judgement(0.0, 2.0, -4.0)], [judgement(0.0, 1.0, -4.0)]
    assert feature_loss(real, fake).item() == pytest.approx(0.25)
    assert feature_loss(real, real).item() == 0


def test_feature_loss_moves_the_reconstruction_only():
    real, fake = torch.ones(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 2, 2, requires_grad=True)
    feature_loss([Judgement(real, (real,))], [Judgement(fake, (fake,))]).backward()
    assert real.grad is None
    assert (fake.grad < 0).all()


def test_lecam_is_its_formula():
    real, fake = [judgement(0.5), judgement(2.0)], [judgement(-1.0), judgement(0.0)]
    loss = lecam_loss(real, fake, real_scores=torch.tensor([0.25, 1.0]), fake_scores=torch.tensor([-0.5, -3.0]))
    assert loss.item() == pytest.approx(((1.0 + 1.25**2) + (25 + 1)) / 2)


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    layer = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    weight = adaptive_weight((3 * layer).sum(), (layer * torch.tensor([0.0, 0.5])).sum(), layer)
    assert weight == pytest.approx(3 * 2**0.5 / 0.5, rel=1e-5)
    assert adaptive_weight((3 * layer).sum(), 0 * layer.sum(), layer) == 1e4
    assert layer.grad is None


def adversary(**values):
    return Adversary(AdversarialConfig(**values), PatchDiscriminator(PatchConfig(width=4, layers=1)))


def test_each_side_moves_itself_only():
    contest = adversary(feature=1.0, lecam=0.1)
    output, target = torch.zeros(2, 3, 8, 8, requires_grad=True), torch.rand(2, 3, 8, 8)
    terms = contest.fool(output, target)
    assert list(terms) == ["adversarial", "feature"]
    sum(term.value for term in terms.values()).backward()
    assert output.grad.abs().sum() > 0
    assert all(p.grad is None for p in contest.parameters())
    loss, metrics = contest(output.detach(), target)
    loss.backward()
    assert all(p.grad is not None for p in contest.parameters())
    assert set(metrics) == {"critic", "critic.real", "critic.fake"}
    assert list(adversary().fool(output, target)) == ["adversarial"]


def test_lecam_remembers_mean_scores_in_the_state():
    contest = adversary(lecam=0.1)
    _, metrics = contest(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
    assert contest.state_dict()["real_scores"].item() == pytest.approx(0.01 * metrics["critic.real"], rel=1e-3)
    assert contest.state_dict()["fake_scores"].item() == pytest.approx(0.01 * metrics["critic.fake"], rel=1e-3)


def test_a_discriminator_learns_and_the_way_out_is_toward_the_originals():
    contest = adversary()
    real, fake = torch.rand(4, 3, 8, 8) * 0.2 + 0.7, -torch.rand(4, 3, 8, 8)
    optimizer = torch.optim.Adam(contest.parameters(), 5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss, metrics = contest(fake, real)
        loss.backward()
        optimizer.step()
    assert metrics["critic"] < 0.5 and metrics["critic.real"] > metrics["critic.fake"]
    between = [contest.fool(fake + share * (real - fake), real)["adversarial"].value.item() for share in (0.0, 1.0)]
    assert between[1] < between[0] - 1
