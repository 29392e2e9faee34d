import math

import pytest
import torch

from mmtp.eval.reconstruction import EvalError, psnr, ssim
from mmtp.eval.video import evaluate_video_tokenizer
from mmtp.tokenizers.quantizers import FSQ
from mmtp.tokenizers.video.conv import ConvVideoTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    config = ConvVideoTokenizer.Config(
        patch=2,
        widths=(4, 4),
        time_strides=(2,),
        encoder_blocks=(0, 0),
        decoder_blocks=(0, 0),
        quantizer=FSQ.Config(levels=(5, 5)),
    )
    torch.manual_seed(0)
    return config.build().eval()


def test_a_whole_set(tokenizer):
    videos = [torch.rand(3, 4, 12, 16), torch.rand(3, 1, 8, 8)]
    figures = evaluate_video_tokenizer(tokenizer, iter(videos))
    assert (figures["videos"], figures["frames"]) == (2, 5)
    assert figures["tokens"] == 3 * 3 * 4 + 2 * 2
    assert figures["bits_per_pixel"] == pytest.approx(40 * math.log2(25) / (4 * 12 * 16 + 8 * 8))
    back = [b.mul(255).round().div(255) for b in tokenizer.decode(tokenizer.encode(videos))]
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        means = [sum(measure(b[:, t], v[:, t]) for t in range(v.shape[1])) / v.shape[1] for b, v in zip(back, videos, strict=True)]
        assert figures[name] == pytest.approx(sum(means) / 2)
    assert figures["psnr_first"] == pytest.approx(sum(psnr(b[:, 0], v[:, 0]) for b, v in zip(back, videos, strict=True)) / 2)
    assert 0 < figures["codebook_usage"] <= 1 <= figures["perplexity"] <= 25


def test_an_empty_set_is_refused(tokenizer):
    with pytest.raises(EvalError, match="no videos"):
        evaluate_video_tokenizer(tokenizer, [])
