"""Tiny picture tokenizers whose networks see all they can and whose codes differ."""

import pytest
import torch

from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.image.one_d import OneDImageTokenizer
from mmtp.tokenizers.image.transformer import TransformerConfig
from mmtp.tokenizers.image.vit import ViTImageTokenizer
from mmtp.tokenizers.quantizers import FSQ, ResidualFSQ

FSQ_125 = FSQ.Config(levels=(5, 5, 5))
RESIDUAL = ResidualFSQ.Config(num_codebooks=3, levels=(5, 5, 5))
STACK = TransformerConfig(width=24, depth=1, num_heads=2, mlp_width=32)
CONFIGS = {
    "conv": ConvImageTokenizer.Config(patch=2, widths=(8, 12), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=FSQ_125),
    "wide-conv": ConvImageTokenizer.Config(
        patch=2, widths=(8, 12), encoder_blocks=(1, 1), decoder_blocks=(1, 1), encoder_kernel=3, quantizer=RESIDUAL
    ),
    "vit": ViTImageTokenizer.Config(patch=4, tile=64, encoder=STACK, decoder=STACK, quantizer=FSQ_125),
    "1d": OneDImageTokenizer.Config(size=(16, 24), patch=8, num_latents=5, encoder=STACK, decoder=STACK, quantizer=RESIDUAL),
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


@pytest.fixture(params=["conv", "wide-conv", "vit"])
def cells(request):
    """Tokenizers of pictures of any size."""
    return TOKENIZERS[request.param]


@pytest.fixture(params=CONFIGS)
def anyone(request):
    return TOKENIZERS[request.param]


@pytest.fixture
def vit():
    return TOKENIZERS["vit"]


@pytest.fixture
def one_d():
    return TOKENIZERS["1d"]


@pytest.fixture
def noise():
    def make(*sizes: tuple[int, int]) -> list[torch.Tensor]:
        return [torch.rand(3, h, w, generator=torch.Generator().manual_seed(100 * h + w + i)) for i, (h, w) in enumerate(sizes)]

    return make
