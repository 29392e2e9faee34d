import pytest
import torch

from mmtp.eval.precision import bfloat16_difference, in_bfloat16
from mmtp.hub import find, from_pretrained
from mmtp.testing.golden import golden_media, read_golden
from mmtp.tokenizers.audio.frame import FrameAudioTokenizer
from mmtp.tokenizers.quantizers import ResidualFSQ


def test_the_zoo_entry_is_stable_in_bfloat16():
    folder = find("image-fsq-f8")
    tokenizer = from_pretrained(folder)
    (share,) = bfloat16_difference(tokenizer, golden_media(tokenizer, read_golden(folder / "golden.safetensors")))
    assert 0 <= share < 0.1


def test_every_codebook_has_a_share_of_its_own():
    config = FrameAudioTokenizer.Config(window=80, hop=20, width=16, quantizer=ResidualFSQ.Config(num_codebooks=3))
    tokenizer = config.build().eval()
    for parameter in tokenizer.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sounds = [torch.rand(1, n) * 2 - 1 for n in (4000, 1000, 7)]
    before = tokenizer.encode(sounds).ids
    shares = bfloat16_difference(tokenizer, sounds)
    assert len(shares) == 3
    assert 0 < shares[0] < shares[2] < 1  # the last codes what rounding has touched most
    assert torch.equal(tokenizer.encode(sounds).ids, before)


def test_a_network_comes_back_as_it_was():
    layer = torch.nn.Linear(8, 8)
    given = torch.randn(4, 8)
    expected = layer(given)
    with in_bfloat16(layer):
        assert layer(given).dtype == torch.float32
        assert not torch.equal(layer(given), expected)
    with pytest.raises(RuntimeError, match="shape"), in_bfloat16(layer):
        layer(given[:, :3])
    assert torch.equal(layer(given), expected)
