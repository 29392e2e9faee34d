import pytest
import torch

from mmtp.train.losses.adversarial import (
    DiscriminatorConfig,
    Judgement,
    SpectrogramDiscriminator,
    discriminator_loss,
    feature_loss,
    generator_loss,
)


@pytest.fixture
def discriminator():
    return SpectrogramDiscriminator(DiscriminatorConfig(windows=(64, 128), width=4, dilations=(1, 2)))


def judgement(score, *features):
    return Judgement(torch.full((1, 1, 2, 2), score), tuple(torch.full((1, 1, 2, 2), f) for f in features))


def test_one_judgement_per_resolution_with_features_of_every_layer(discriminator):
    judgements = discriminator(torch.rand(2, 1, 640) * 2 - 1)
    assert len(judgements) == 2
    for judged, window in zip(judgements, (64, 128), strict=True):
        frames = 640 // (window // 4) + 1
        assert judged.scores.shape[:3] == (2, 1, frames)
        assert [f.shape[1] for f in judged.features] == [4, 4, 4, 4]
        assert [f.shape[3] for f in judged.features] == [window // 2 + 1, window // 4 + 1, window // 8 + 1, window // 8 + 1]


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


def test_it_learns_to_tell_tones_from_noise_and_shows_the_way():
    discriminator = SpectrogramDiscriminator(DiscriminatorConfig(windows=(32,), width=4, dilations=(1,)))
    time = torch.arange(160.0)
    real = torch.stack([torch.sin(time * w) for w in (0.1, 0.2, 0.5, 0.9)])[:, None]
    fake = torch.rand(4, 1, 160) * 2 - 1
    weights = list(discriminator.parameters())
    for _ in range(40):
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.02 * gradient.sign()
    assert loss < 1  # 2 is a coin toss
    fake.requires_grad_()
    before = generator_loss(discriminator(fake))
    before.backward()
    assert generator_loss(discriminator(fake - 0.01 * fake.grad / fake.grad.abs().mean())) < before


def test_silence_is_judged_without_harm(discriminator):
    silence = torch.zeros(1, 1, 100, requires_grad=True)
    generator_loss(discriminator(silence)).backward()
    assert silence.grad.isfinite().all()
