import pytest
import torch

from mmtp.config import ConfigError, build_config
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.audio.frame import FrameAudioTokenizer
from mmtp.tokenizers.quantizers import VQ


@pytest.mark.parametrize("causal", [False, True])
def test_conforms_with_one_learned_codebook(sounds, causal):
    config = FrameAudioTokenizer.Config(
        sample_rate=24000,
        window=24,
        hop=12,
        width=8,
        encoder_blocks=1,
        decoder_blocks=1,
        causal=causal,
        quantizer=VQ.Config(codebook_size=16),
    )
    tokenizer = config.build()
    tokenizer(torch.rand(2, 1, 600) * 2 - 1)
    check_tokenizer(tokenizer.eval(), sounds(100, 77))


def test_the_default_is_50_frames_of_8_codebooks_a_second():
    tokenizer = FrameAudioTokenizer.Config().build()
    assert (tokenizer.config.downsampling, tokenizer.frame_rate) == (320, 50)
    assert tokenizer.num_tokens((16000,)) == 8 * 50
    assert 6.0e6 < sum(p.numel() for p in tokenizer.parameters()) < 6.6e6


def test_nothing_runs_faster_than_the_codes(sounds):
    tokenizer = FrameAudioTokenizer.Config(window=80, hop=20, width=16).build().eval()
    lengths = []
    for module in tokenizer.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        tokenizer.decoder(tokenizer.encoder(sounds(2000)[0][None]))
    assert max(lengths) <= 100 + 4


def test_a_window_that_is_not_whole_hops_is_refused():
    with pytest.raises(ConfigError, match="window 1000 with hop 320: a window of at least 2 whole hops"):
        build_config("tokenizer", {"type": "audio-frame", "window": 1000})
