import pytest
import torch
from safetensors.torch import save_file

from mmtp.config import ConfigError, from_dict
from mmtp.nn.features import TimmStages
from mmtp.train.losses.perceptual import PerceptualConfig, PerceptualLoss, build_perceptual

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
        ({"network": "timm:test_resnett"}, "loss.perceptual: timm's 'test_resnett' cannot be loaded"),
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
        ({"network": "vgg"}, "loss.perceptual: network 'vgg' is none of 'efficientnet-lite0', 'efficientnet-lite2' and 'timm:NAME'"),
        ({"weights": "x.pth"}, "'efficientnet-lite0' brings its own"),
        ({"layers": []}, "at least one stage"),
    ],
)
def test_choices_that_are_none(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(PerceptualConfig, values, "loss.perceptual")
