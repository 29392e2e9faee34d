import math

import pytest
import torch

from mmtp.eval.reconstruction import EvalError, evaluate_tokenizer, psnr, ssim
from mmtp.testing.fakes import BlockTokenizer


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


@pytest.mark.usefixtures("block_registered")
def test_a_whole_set():
    tokenizer = BlockTokenizer(BlockTokenizer.Config(block=4, levels=5))
    exact = [torch.full((3, 8, 8), shade / 4) for shade in range(4)]
    figures = evaluate_tokenizer(tokenizer, iter([*exact, torch.full((3, 4, 12), 1.0)]))
    assert figures["images"] == 5
    assert figures["tokens"] == 3 * (4 * 4 + 3)
    assert figures["bits_per_pixel"] == pytest.approx(3 * math.log2(5) / 16)
    assert figures["codebook_usage"] == pytest.approx(1.0)
    shares = [4 / 19] * 4 + [3 / 19]
    assert figures["perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert figures["psnr"] > 45  # only the rounding to 8 bits is left
    assert figures["ssim"] > 0.999


@pytest.mark.usefixtures("block_registered")
def test_an_empty_set_is_refused():
    with pytest.raises(EvalError, match="no pictures"):
        evaluate_tokenizer(BlockTokenizer(BlockTokenizer.Config()), [])
