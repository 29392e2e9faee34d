import math

import pytest
import torch
from safetensors.torch import save_file

from mmtp.eval.codes import EvalError
from mmtp.eval.features import PASS, FeatureDistances, FeatureNetwork, Gaussian, Seen, frechet_distance
from mmtp.nn.features import perceptual_distances, resized

from .sight import colours


class Known(Gaussian):
    """A distribution that is known, not gathered."""

    def __init__(self, mean: list[float], covariance: torch.Tensor) -> None:
        super().__init__()
        self._known = torch.tensor(mean, dtype=torch.double), covariance.double()

    @property
    def mean(self):
        return self._known[0]

    @property
    def covariance(self):
        return self._known[1]


def test_a_gaussian_has_the_moments_of_all_its_vectors():
    vectors = torch.randn(30, 4) * torch.tensor([1.0, 2, 3, 4]) + 5
    gaussian = Gaussian()
    for part in vectors.split([1, 12, 17]):
        gaussian.add(part)
    assert gaussian.count == 30
    torch.testing.assert_close(gaussian.mean, vectors.double().mean(0))
    torch.testing.assert_close(gaussian.covariance, vectors.double().T.cov())


def test_frechet_distance_of_commuting_covariances():
    a, b = torch.tensor([[1.0, 4, 9], [4, 4, 0]], dtype=torch.double)
    expected = 9 + 16 + float((a.sqrt() - b.sqrt()).square().sum())
    turned = torch.linalg.qr(torch.randn(3, 3, dtype=torch.double)).Q
    for basis in (torch.eye(3, dtype=torch.double), turned):
        known = [Known(mean, basis @ values.diag() @ basis.T) for mean, values in (([0, 0, 0], a), ([3, 0, 4], b))]
        # An eigenvalue of 0 comes out as about 1e-15, and its root as 1e-7.
        assert frechet_distance(*known) == pytest.approx(expected, abs=1e-6)
        assert frechet_distance(*reversed(known)) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = torch.tensor([[[2.0, 1], [1, 3]], [[5, -2], [-2, 1]]], dtype=torch.double)
    # The root of a matrix of two rows has the trace sqrt(trace + 2 sqrt(determinant)).
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.det(a) * torch.det(b))))
    assert frechet_distance(Known([0, 0], a), Known([0, 0], b)) == pytest.approx(5 + 6 - 2 * root, rel=1e-9)


@pytest.mark.parametrize("count", [5, 500])
def test_equal_sets_are_at_no_distance(count):
    gaussian = Gaussian()
    gaussian.add(100 * torch.randn(count, 40).relu())
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-8)


def test_distances_of_a_set_do_not_depend_on_batches():
    network = FeatureNetwork("colours", colours)
    pictures = [torch.rand(3, 9 + i, 30 - i) for i in range(8)]
    outputs = [(p + 0.2 * torch.randn_like(p)).clamp(0, 1) for p in pictures]
    whole, parts = FeatureDistances(), FeatureDistances()
    whole.add(network.look(outputs), network.look(pictures))
    for part in (slice(0, 3), slice(3, 8)):
        parts.add(network.look(outputs[part]), network.look(pictures[part]))
    assert parts.perceptual == pytest.approx(whole.perceptual, rel=1e-5)
    assert parts.frechet == pytest.approx(whole.frechet, rel=1e-5)
    each = [perceptual_distances(*(colours(resized(x[None]) * 2 - 1) for x in pair)) for pair in zip(outputs, pictures, strict=True)]
    assert whole.perceptual == pytest.approx(float(torch.cat(each).mean()), rel=1e-5) and whole.perceptual > 0
    assert whole.frechet > 0


@pytest.mark.parametrize(("count", "remark"), [(1, "one picture"), (3, "singular"), (4, "few pictures bias")])
def test_what_few_pictures_mean_is_said(count, remark):
    distances = FeatureDistances()
    seen = Seen([torch.rand(count, 2, 2, 2)], torch.rand(count, 3))
    distances.add(seen, seen)
    assert remark in distances.remark
    assert (distances.frechet is None) == (count == 1)


def test_a_network_of_timm_with_weights_of_a_file(tmp_path):
    import timm

    model = timm.create_model("test_resnet", pretrained=False)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    network = FeatureNetwork.load(f"timm:test_resnet:{tmp_path / 'weights.safetensors'}")
    assert network.name == "timm:test_resnet"
    seen = network.look([torch.rand(3, 20, 30), torch.rand(3, 64, 64)])
    assert len(seen.stages) == 4 and seen.pooled.shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg", "--features: network 'vgg' is none of"),
        ("timm:test_resnett", "--features: timm's 'test_resnett' cannot be loaded"),
        ("timm:test_resnet:gone.pth", "cannot be loaded"),
        ("efficientnet-lite0:x.pth", "is none of"),
    ],
)
def test_networks_that_there_are_not(name, message):
    with pytest.raises(EvalError, match=message) as error:
        FeatureNetwork.load(name)
    assert "\n" not in str(error.value)


def test_pooled_features_of_many_pictures_are_those_of_each():
    network = FeatureNetwork("colours", colours)
    pictures = list(torch.rand(PASS + 3, 3, 8, 8))
    assert torch.allclose(network.pooled(pictures), network.look(pictures).pooled)
