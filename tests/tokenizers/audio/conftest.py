"""Four tiny tokenizers, of both kinds, causal and not, whose networks see all of their neighbourhood and whose codes differ."""

import pytest
import torch

from mmtp.tokenizers.audio.conv import ConvAudioTokenizer
from mmtp.tokenizers.audio.frame import FrameAudioTokenizer
from mmtp.tokenizers.quantizers import FSQ, ResidualFSQ


def build(name: str):
    causal = name.startswith("causal")
    torch.manual_seed(0)
    if name.endswith("conv"):
        fsq = FSQ.Config(levels=(5, 5, 5))
        config = ConvAudioTokenizer.Config(strides=(2, 4), encoder_width=4, decoder_width=4, dilations=(1, 3), causal=causal, quantizer=fsq)
    else:
        fsq = ResidualFSQ.Config(num_codebooks=3, levels=(5, 5, 5))
        config = FrameAudioTokenizer.Config(
            window=32, hop=8, width=16, encoder_blocks=2, decoder_blocks=2, kernel=5, causal=causal, quantizer=fsq
        )
    built = config.build().eval()
    for key, parameter in built.named_parameters():
        # As they are built, networks make quiet sounds and few codes.
        if key.endswith("length"):
            parameter.data.mul_(2.0 if key.startswith("encoder") else 1.4)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return built


TOKENIZERS = {name: build(name) for name in ("conv", "frame", "causal-conv", "causal-frame")}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.fixture(params=[name for name in TOKENIZERS if name.startswith("causal")])
def causal(request):
    return TOKENIZERS[request.param]


@pytest.fixture
def sounds():
    def make(*sizes: int) -> list[torch.Tensor]:
        return [torch.rand(1, n, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in sizes]

    return make
