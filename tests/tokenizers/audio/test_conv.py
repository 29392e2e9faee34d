import pytest
import torch

from mmtp.config import ConfigError, build_config
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.audio.conv import ConvAudioTokenizer
from mmtp.tokenizers.quantizers import ResidualVQ


@pytest.mark.parametrize("causal", [False, True])
def test_conforms_with_learned_codebooks(sounds, causal):
    quantizer = ResidualVQ.Config(num_codebooks=2, codebook_size=16, codebook_dim=4)
    config = ConvAudioTokenizer.Config(strides=(3, 4), encoder_width=4, decoder_width=4, dilations=(1,), causal=causal, quantizer=quantizer)
    tokenizer = config.build()
    tokenizer(torch.rand(2, 1, 600) * 2 - 1)
    check_tokenizer(tokenizer.eval(), sounds(100, 77))


def test_the_default_is_50_frames_of_8_codebooks_a_second():
    with torch.device("meta"):
        tokenizer = ConvAudioTokenizer.Config().build()
    assert (tokenizer.config.downsampling, tokenizer.frame_rate) == (320, 50)
    assert tokenizer.num_tokens((16000,)) == 8 * 50
    assert tokenizer.config.dim == 512


def test_every_kernel_is_weight_normalised():
    tokenizer = ConvAudioTokenizer.Config(strides=(2,), encoder_width=4, decoder_width=4, dilations=(1,)).build()
    kernels = [name for net in (tokenizer.encoder, tokenizer.decoder) for name, _ in net.named_parameters() if name.endswith("conv.weight")]
    lengths = [name for net in (tokenizer.encoder, tokenizer.decoder) for name, _ in net.named_parameters() if name.endswith("length")]
    assert len(kernels) == len(lengths) == 10


def test_loud_input_gives_bounded_output():
    tokenizer = ConvAudioTokenizer.Config(strides=(2,), encoder_width=4, decoder_width=4, dilations=(1,)).build().eval()
    assert tokenizer.decoder(torch.randn(1, 8, 20) * 1e3).abs().max() <= 1


def test_configuration_names_what_is_wrong():
    with pytest.raises(ConfigError, match=r"strides \[2, 1\]: at least one, and each at least 2, are wanted"):
        build_config("tokenizer", {"type": "audio-conv", "strides": [2, 1]})
    with pytest.raises(ConfigError, match="did you mean 'causal'"):
        build_config("tokenizer", {"type": "audio-conv", "casual": True})
