"""Tiny video tokenizers whose networks see all they can and whose codes differ."""

import pytest
import torch

from mmtp.tokenizers.quantizers import FSQ, ResidualFSQ
from mmtp.tokenizers.video.conv import ConvVideoTokenizer

FSQ_125 = FSQ.Config(levels=(5, 5, 5))
CONFIGS = {
    "f4t4": ConvVideoTokenizer.Config(
        patch=2, widths=(8, 12), time_strides=(4,), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=FSQ_125
    ),
    "f4t4-in-two": ConvVideoTokenizer.Config(
        patch=1,
        widths=(6, 8, 12),
        time_strides=(2, 2),
        encoder_blocks=(1, 0, 1),
        decoder_blocks=(1, 0, 1),
        quantizer=ResidualFSQ.Config(num_codebooks=3, levels=(5, 5, 5)),
    ),
    "f4t1": ConvVideoTokenizer.Config(patch=4, widths=(12,), time_strides=(), encoder_blocks=(1,), decoder_blocks=(1,), quantizer=FSQ_125),
}


def build(name: str):
    torch.manual_seed(0)
    built = CONFIGS[name].build().eval()
    for parameter in built.parameters():
        # As they are built, residual branches do nothing and codes are nearly all the same.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return built


TOKENIZERS = {name: build(name) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def anyone(request):
    return TOKENIZERS[request.param]


@pytest.fixture
def f4t4():
    return TOKENIZERS["f4t4"]


@pytest.fixture
def noise():
    def make(*sizes: tuple[int, int, int]) -> list[torch.Tensor]:
        return [torch.rand(3, *size, generator=torch.Generator().manual_seed(sum(size) + i)) for i, size in enumerate(sizes)]

    return make
