import math

import pytest
import torch

from mmtp.eval.curves import RateResult
from mmtp.eval.rate import CODECS, RatePoint, compare_rates, encode_file
from mmtp.eval.reconstruction import EvalError
from mmtp.testing.fakes import BlockTokenizer

pytestmark = pytest.mark.usefixtures("block_registered")


def smooth(seed: int, height: int = 40, width: int = 48) -> torch.Tensor:
    """A picture as codecs like them."""
    coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


def test_more_bytes_are_better_pictures():
    tokenizer = BlockTokenizer(BlockTokenizer.Config(block=4, levels=5))
    seen = []
    pictures = [smooth(0), smooth(1), smooth(2, 33, 20)]
    result = compare_rates(tokenizer, "blocks", pictures, qualities=(5, 90), progress=lambda *at: seen.append(at))
    cells = [10 * 12, 10 * 12, 9 * 5]
    assert result.tokenizer.bytes == pytest.approx(sum(math.ceil(3 * n * math.log2(5) / 8) + 4 for n in cells) / 3)
    for codec in CODECS:
        low, high = (p for p in result.codecs if p.name == codec)
        assert low.bytes < high.bytes
        assert low.psnr < high.psnr
        assert low.ssim < high.ssim
        middle = result.at(codec, math.sqrt(low.bytes * high.bytes))
        assert middle.psnr == pytest.approx((low.psnr + high.psnr) / 2)
        assert result.at(codec, low.bytes - 1) is None
        assert result.at(codec, 10 * high.bytes) == high
    assert seen == [(i, 7) for i in range(1, 8)]


def test_bytes_are_those_of_the_file():
    picture = smooth(3)
    result = compare_rates(BlockTokenizer(BlockTokenizer.Config()), "blocks", [picture], qualities=(50,))
    assert [p.bytes for p in result.codecs] == [len(encode_file(picture, 50, settings)) for settings in CODECS.values()]


def test_the_table_says_what_a_codec_cannot_reach():
    result = RateResult(
        RatePoint("mine", "", 100, 30.0, 0.9), [RatePoint("JPEG", "5", 150, 20.0, 0.5), RatePoint("JPEG", "9", 300, 26.0, 0.7)]
    )
    rows = result.table().rows
    assert rows[1] == ["JPEG", "equal bytes", None, None, None]
    assert rows[2][2:] == ["200", "22.49 dB", "0.583"]
    assert rows[3][1:3] == ["smallest (quality 5)", "150"]
    assert "svg" in result.figure().html()


def test_an_empty_set_is_refused():
    with pytest.raises(EvalError, match="no pictures"):
        compare_rates(BlockTokenizer(BlockTokenizer.Config()), "blocks", [])
