import pytest
import torch

from mmtp.config import ConfigError, from_dict
from mmtp.train.losses.adversarial import discriminator_loss, generator_loss
from mmtp.train.losses.discriminators import PatchConfig, PatchDiscriminator, SpectrogramConfig, SpectrogramDiscriminator


@pytest.fixture
def discriminator():
    return SpectrogramDiscriminator(SpectrogramConfig(windows=(64, 128), width=4, dilations=(1, 2)))


def test_one_judgement_per_resolution_with_features_of_every_layer(discriminator):
    judgements = discriminator(torch.rand(2, 1, 640) * 2 - 1)
    assert len(judgements) == 2
    for judged, window in zip(judgements, (64, 128), strict=True):
        frames = 640 // (window // 4) + 1
        assert judged.scores.shape[:3] == (2, 1, frames)
        assert [f.shape[1] for f in judged.features] == [4, 4, 4, 4]
        assert [f.shape[3] for f in judged.features] == [window // 2 + 1, window // 4 + 1, window // 8 + 1, window // 8 + 1]


def test_it_learns_to_tell_tones_from_noise_and_shows_the_way():
    discriminator = SpectrogramDiscriminator(SpectrogramConfig(windows=(32,), width=4, dilations=(1,)))
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


@pytest.mark.parametrize(("layers", "patch", "size"), [(1, 16, 32), (2, 34, 64)])
def test_a_score_is_of_its_patch_alone(layers, patch, size):
    discriminator = PatchDiscriminator(PatchConfig(width=4, layers=layers))
    for norm in (m for m in discriminator.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.forward = lambda x: x  # statistics of the plane reach everywhere; the kernels must not
    picture = torch.rand(1, 3, size, size, requires_grad=True)
    (judged,) = discriminator(picture)
    assert judged.scores.shape == (1, 1, 14, 14)
    assert [f.shape[1] for f in judged.features] == [4 * 2**i for i in range(layers + 1)]
    judged.scores[0, 0, 7, 7].backward()
    seen = picture.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [patch, patch]


def test_the_least_size_is_the_one_documented():
    discriminator = PatchDiscriminator(PatchConfig(width=2, layers=2))
    assert discriminator(torch.zeros(1, 3, 12, 12))[0].scores.shape == (1, 1, 1, 1)
    with pytest.raises((RuntimeError, ValueError)):
        discriminator(torch.zeros(1, 3, 11, 11))


def test_a_picture_is_judged_whatever_stands_beside_it():
    discriminator = PatchDiscriminator(PatchConfig(width=4, layers=2))
    pictures = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(discriminator(pictures)[0].scores[:1], discriminator(pictures[:1])[0].scores)


def test_shapes_that_are_none():
    with pytest.raises(ConfigError, match="discriminator: width 4, layers 0: each must be at least 1"):
        from_dict(PatchConfig, {"width": 4, "layers": 0}, "discriminator")
