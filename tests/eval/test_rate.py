import math

import pytest
import torch

from mmtp.data.media import decode_image
from mmtp.eval.codes import EvalError
from mmtp.eval.curves import RateResult
from mmtp.eval.features import FeatureDistances, FeatureNetwork
from mmtp.eval.rate import CODECS, RatePoint, compare_rates, encode_file
from mmtp.eval.reconstruction import psnr, ssim
from mmtp.testing.fakes import BlockTokenizer
from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.quantizers import ResidualFSQ

from .sight import colours

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
    assert seen == [(i, 7) for i in range(1, 8)]  # six settings of codecs, and all pictures measured at once


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
    assert result.table().columns == ["", "at", "bytes", "PSNR", "SSIM"]  # no network has looked
    assert len(result.figures()) == 2


def test_without_curves_the_table_is_the_same():
    tokenizer = BlockTokenizer(BlockTokenizer.Config(block=4, levels=5))
    pictures = [smooth(i, 64, 64) for i in range(3)]
    qualities = (0, 20, 60, 90)
    whole, short = (compare_rates(tokenizer, "blocks", pictures, qualities=qualities, curves=curves) for curves in (True, False))
    assert short.table() == whole.table()
    assert len(short.codecs) < len(whole.codecs) == 12
    assert set(short.codecs) < set(whole.codecs)


def test_a_network_looks_at_what_every_codec_makes():
    pictures = [smooth(i) for i in range(3)]
    network = FeatureNetwork("colours", colours)
    result = compare_rates(BlockTokenizer(BlockTokenizer.Config()), "blocks", pictures, network=network, qualities=(10, 80))
    outputs = [decode_image(encode_file(picture, 10, CODECS["WebP"])) for picture in pictures]
    expected = FeatureDistances()
    expected.add(network.look(outputs), network.look(pictures))
    worse, better = (p for p in result.codecs if p.name == "WebP")
    assert worse.perceptual == pytest.approx(expected.perceptual, rel=1e-4) and worse.frechet == pytest.approx(expected.frechet, rel=1e-4)
    assert 0 < better.perceptual < worse.perceptual < result.tokenizer.perceptual
    assert worse.psnr == pytest.approx(sum(psnr(o, p) for o, p in zip(outputs, pictures, strict=True)) / 3)
    assert worse.ssim == pytest.approx(sum(ssim(o, p) for o, p in zip(outputs, pictures, strict=True)) / 3)
    assert result.notes[0] == "perceptual distance: in features of colours" and len(result.figures()) == 4
    assert result.table().columns[-2:] == ["perceptual distance", "Fréchet distance"]


def test_a_residual_tokenizer_is_a_curve():
    torch.manual_seed(0)
    config = ConvImageTokenizer.Config(
        patch=4, widths=(8,), encoder_blocks=(1,), decoder_blocks=(1,), quantizer=ResidualFSQ.Config(num_codebooks=3, levels=(5, 5))
    )
    tokenizer = config.build().eval()
    pictures = [smooth(0, 16, 16), smooth(1, 12, 8)]
    result = compare_rates(tokenizer, "mine", pictures, qualities=(50,))
    assert [p.setting for p in result.fewer] == ["the first codebook", "the first 2 codebooks"]
    sizes = [[math.ceil(k * cells * math.log2(25) / 8) + 4 for cells in (16, 6)] for k in (1, 2, 3)]
    assert [p.bytes for p in (*result.fewer, result.tokenizer)] == [sum(pair) / 2 for pair in sizes]
    codes = tokenizer.encode(pictures[:1])
    (output,) = tokenizer.decode(type(codes)(codes.ids[:, :1], codes.lengths, codes.sizes))
    alone = compare_rates(tokenizer, "mine", pictures[:1], qualities=(50,)).fewer[0]
    assert alone.psnr == pytest.approx(psnr(output.mul(255).round().div(255), pictures[0]), abs=1e-4)
    assert result.table().rows[1][:2] == ["mine", "the first 2 codebooks"]
    assert len(result.to_dict()["fewer_codebooks"]) == 2


def test_an_empty_set_is_refused():
    with pytest.raises(EvalError, match="no pictures"):
        compare_rates(BlockTokenizer(BlockTokenizer.Config()), "blocks", [])
