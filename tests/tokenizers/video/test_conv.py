import pytest
import torch

from mmtp.config import ConfigError, build_config
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.quantizers import VQ
from mmtp.tokenizers.video.conv import ConvVideoTokenizer


@pytest.mark.parametrize(
    ("patch", "widths", "time_strides", "cell"),
    [(2, (8, 8), (1,), (1, 4, 4)), (4, (8, 8), (2,), (2, 8, 8)), (4, (8, 8, 8), (2, 2), (4, 16, 16)), (3, (8,), (), (1, 3, 3))],
)
def test_downsampling(patch, widths, time_strides, cell):
    blocks = (1,) * len(widths)
    config = ConvVideoTokenizer.Config(patch=patch, widths=widths, time_strides=time_strides, encoder_blocks=blocks, decoder_blocks=blocks)
    tokenizer, video = config.build().eval(), torch.rand(3, 6, 20, 33)
    assert tokenizer.spec.downsampling == cell
    (back,) = tokenizer.decode(tokenizer.encode([video]))
    assert back.shape == video.shape


def test_conforms_with_a_learned_codebook():
    config = ConvVideoTokenizer.Config(
        widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=VQ.Config(codebook_size=16, codebook_dim=4), frame_rate=8.0
    )
    tokenizer = config.build()
    tokenizer(torch.rand(2, 3, 5, 16, 16))
    assert tokenizer.spec.sample_rate == 8
    check_tokenizer(tokenizer.eval(), [torch.rand(3, 5, 16, 16), torch.rand(3, 2, 9, 21)])


def test_half_size_weights_load_to_the_same_tokenizer_every_time(f4t4, noise, tmp_path):
    first = from_pretrained(save_pretrained(f4t4, tmp_path / "a", dtype="float16"))
    second = from_pretrained(save_pretrained(first, tmp_path / "b", dtype="float16"))
    assert first.spec == second.spec
    assert torch.equal(first.encode(noise((5, 8, 8))).ids, second.encode(noise((5, 8, 8))).ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_strides": [2, 2]}, "time_strides one for each step between them"),
        ({"time_strides": [0]}, "patch 4, time_strides .0.: each must be at least 1"),
        ({"frame_rate": 0}, "frame_rate 0: more than 0 is wanted"),
        ({"time_stride": [2]}, "unknown key 'time_stride'; did you mean 'time_strides'"),
    ],
)
def test_configuration_names_what_is_wrong(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_config("tokenizer", {"type": "video-conv", **fields})
