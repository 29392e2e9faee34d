import pytest
import torch
import torch.nn.functional as F

from mmtp.config import ConfigError, from_dict
from mmtp.tokenizers.continuous.vit import TimmViT
from mmtp.train.losses.distill import DistillConfig, Distiller, Statistics, masked_patches, random_mask, weighted_mean

TEACHERS = [{"network": "efficientnet-lite0"}, {"network": "timm:other", "weight": 2.0}]
OPTIONS = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}
MODELS = {
    "vit_tiny_patch16_224": {"img_size": 16, "reg_tokens": 2},
    "eva02_tiny_patch14_224": {"img_size": 16},
    "naflexvit_base_patch16_gap": {"pos_embed_grid_size": [4, 4]},
}


def config(**values):
    return from_dict(DistillConfig, {"teachers": TEACHERS, **values}, "loss.distill")


def test_exactly_the_share_is_masked_and_every_patch_in_turn():
    mask = random_mask(200, 64, 0.35, torch.Generator().manual_seed(0))
    assert mask.shape == (200, 64) and (mask.sum(1) == 22).all()
    assert mask.float().mean(0).min() > 0.2 and mask.float().mean(0).max() < 0.5
    assert not random_mask(2, 64, 0.0, torch.Generator()).any()


def test_targets_have_mean_0_and_variance_1():
    features = torch.randn(8, 16, 5) * torch.tensor([0.1, 1.0, 30.0, 2.0, 0.0]) + torch.arange(5)
    distiller = Distiller(config(), 6, [Statistics.of(features), Statistics.of(features)])
    found = distiller.standardise(0, features).flatten(0, 1)
    torch.testing.assert_close(found.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(0, correction=0), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize(("masked", "visible"), [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5)])
def test_the_loss_is_cosine_and_smooth_l1_at_the_patches_that_count(masked, visible):
    torch.manual_seed(0)
    distiller = Distiller(config(masked=masked, visible=visible), 6, [Statistics(torch.zeros(c), torch.ones(c)) for c in (5, 7)])
    values, mask = torch.randn(3, 8, 6), random_mask(3, 8, 0.35, torch.Generator().manual_seed(1))
    targets = [torch.randn(3, 8, 5), torch.randn(3, 8, 7)]
    loss, metrics = distiller(values, targets, mask)
    expected = 0.0
    for adapter, target, weight in zip(distiller.adapters, targets, (1.0, 2.0), strict=True):
        total, count = 0.0, 0.0
        output = adapter(values)
        for i in range(3):
            for j in range(8):
                a, b = output[i, j], target[i, j]
                d = (a - b).abs()
                smooth = torch.where(d < 1, d**2 / 2, d - 0.5).mean()
                share = masked if mask[i, j] else visible
                total += share * (0.9 * (1 - a @ b / a.norm() / b.norm()) + 0.1 * smooth)
                count += share
        expected += weight * total / count
    torch.testing.assert_close(loss, expected)
    assert metrics["other.masked_cosine"] == pytest.approx(F.cosine_similarity(output, target, dim=2)[mask].mean().item(), abs=1e-5)
    perfect = [adapter(values).detach() for adapter in distiller.adapters]
    assert distiller(values, perfect, mask)[0].item() == pytest.approx(0, abs=1e-5)


def test_weighted_mean():
    assert weighted_mean(torch.tensor([[1.0, 5.0, 9.0]]), torch.tensor([[1.0, 0.5, 0.0]])) == pytest.approx(3.5 / 1.5)


@pytest.mark.parametrize("name", MODELS)
def test_masked_patches_are_not_seen(name):
    torch.manual_seed(0)
    student = TimmViT.Config(model=name, options=OPTIONS | MODELS[name]).build().eval()
    token = torch.randn(24, requires_grad=True)
    pictures = torch.rand(2, 3, 16, 16)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = mask[1, 0] = mask[1, 15] = True
    changed = pictures.clone()
    changed[0, :, 4:8, 4:8] = changed[1, :, :4, :4] = changed[1, :, 12:, 12:] = 0.5
    plain = student(pictures).values
    with masked_patches(student, token, mask):
        seen, again = student(pictures).values, student(changed).values
    torch.testing.assert_close(seen, again)
    assert not torch.allclose(seen, plain, atol=1e-3)
    assert not torch.allclose(student(changed).values, plain, atol=1e-3)  # beyond the context nothing is masked
    seen.square().sum().backward()
    assert token.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teachers": []}, "at least one, and each once"),
        ({"teachers": [TEACHERS[0], TEACHERS[0]]}, "each once"),
        ({"teachers": [{"network": "dino"}]}, "network 'dino' is none of"),
        ({"teachers": [{"network": "tokenizer:x", "weights": "y"}]}, "brings its own"),
        ({"teachers": [{"network": "efficientnet-lite0", "weight": 0.0}]}, "weight 0"),
        ({"mask": 1.0}, "mask 1: at least 0 and less than 1"),
        ({"mask": 0.0, "visible": 0.0}, "no patch would count"),
        ({"cosine": 0.0, "smooth_l1": 0.0}, "one of the last two"),
        ({"statistics": 0}, "too small"),
    ],
)
def test_settings_that_are_none(values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)
