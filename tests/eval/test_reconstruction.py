import math

import pytest
import torch

from mmtp.eval.codes import EvalError
from mmtp.eval.features import FeatureNetwork
from mmtp.eval.reconstruction import WINDOW, evaluate_tokenizer, psnr, ssim
from mmtp.testing.fakes import BlockTokenizer

from .sight import colours


def test_psnr_of_a_known_error():
    target = torch.zeros(3, 4, 4)
    assert psnr(target + 0.1, target) == pytest.approx(20.0, abs=1e-4)
    assert psnr(target, target) == 100.0


def test_ssim_of_known_pictures():
    picture = torch.rand(3, 24, 20)
    assert ssim(picture, picture) == pytest.approx(1.0)
    flat, other = torch.full((3, 24, 20), 0.5), torch.full((3, 24, 20), 0.6)
    # Of flat pictures only the luminance term is left.
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert ssim(flat, other) == pytest.approx(expected, abs=1e-6)
    noisy = (picture + 0.3 * torch.randn_like(picture)).clamp(0, 1)
    assert ssim(noisy, picture) < 0.9
    assert ssim(picture[:, :5, :7], picture[:, :5, :7]) == pytest.approx(1.0)


def test_ssim_is_that_of_a_convolution():
    """The definition, written as one two-dimensional window."""
    x, y = torch.rand(2, 3, 17, 24, dtype=torch.double)
    line = torch.exp(-(torch.arange(WINDOW) - WINDOW // 2).double().square() / (2 * 1.5**2))
    window = line.outer(line)[None, None] / line.sum() ** 2

    def mean(z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(z[:, None], window)

    mean_x, mean_y = mean(x), mean(y)
    top = (2 * mean_x * mean_y + 1e-4) * (2 * (mean(x * y) - mean_x * mean_y) + 9e-4)
    below = (mean_x**2 + mean_y**2 + 1e-4) * (mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2 + 9e-4)
    assert ssim(x, y) == pytest.approx(float((top / below).mean()), abs=1e-12)


@pytest.mark.usefixtures("block_registered")
def test_a_whole_set():
    tokenizer = BlockTokenizer(BlockTokenizer.Config(block=4, levels=5))
    exact = [torch.full((3, 8, 8), shade / 4) for shade in range(4)]
    result = evaluate_tokenizer(tokenizer, iter([*exact, torch.full((3, 4, 12), 1.0)]))
    figures = result.to_dict()
    assert figures["images"] == 5
    assert figures["tokens"] == 3 * (4 * 4 + 3)
    assert figures["bits_per_pixel"] == pytest.approx(3 * math.log2(5) / 16)
    assert figures["codebook_usage"] == pytest.approx(1.0)
    shares = [4 / 19] * 4 + [3 / 19]
    assert figures["perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert figures["psnr"] > 45  # only the rounding to 8 bits is left
    assert figures["ssim"] > 0.999
    assert result.headline == figures["psnr"] and "perceptual" not in figures and len(figures["codebooks"]) == 3


@pytest.mark.usefixtures("block_registered")
def test_a_network_looks_at_what_comes_back():
    tokenizer = BlockTokenizer(BlockTokenizer.Config(block=4, levels=5))
    network = FeatureNetwork("colours", colours)
    exact = [torch.full((3, 8, 8), shade / 4) for shade in range(4)]
    # What levels of a quarter can say comes back, but for its rounding to 8 bits.
    near, far = (evaluate_tokenizer(tokenizer, [p * gain for p in exact], network).to_dict() for gain in (1, 0.8))
    assert near["perceptual"] == pytest.approx(0, abs=1e-4) and near["frechet"] == pytest.approx(0, abs=1e-4)
    assert far["perceptual"] > 100 * near["perceptual"] and far["frechet"] > 100 * near["frechet"]
    table = evaluate_tokenizer(tokenizer, exact[:1], network).tables("Title")[0]
    remarks = {row[0]: row[1:] for row in table.rows}
    assert remarks["perceptual distance"][1] == "in features of colours"
    assert remarks["Fréchet distance"] == [None, "in features of colours; one picture has no covariance"]


@pytest.mark.usefixtures("block_registered")
def test_an_empty_set_is_refused():
    with pytest.raises(EvalError, match="no pictures"):
        evaluate_tokenizer(BlockTokenizer(BlockTokenizer.Config()), [])
