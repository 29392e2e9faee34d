"""Every registered tokenizer keeps the promises of ``mmtp/tokenizers/base.py``."""

import pytest
import torch

from mmtp.registry import REGISTRY
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.base import ContinuousTokenizer, DiscreteTokenizer
from tests.tokenizers.pretrained.common import SETTINGS, media, tokenizer

PICTURES = [torch.rand(3, 17, 30, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 1, 1), torch.ones(3, 24, 16)]
SOUNDS = [torch.rand(1, 333, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.zeros(1, 1), torch.ones(1, 400)]
TEXTS = ["", "draw a blue circle", "Ünïcode 漢字 🙂 \u202e\x00\r\n ", "a" * 300]


def image_conv():
    from mmtp.tokenizers.image.conv import ConvImageTokenizer
    from mmtp.tokenizers.quantizers import FSQ

    config = ConvImageTokenizer.Config(widths=(8, 16), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=FSQ.Config(levels=(5, 5, 5)))
    return config.build().eval(), PICTURES


def image_vit():
    from mmtp.tokenizers.image.transformer import TransformerConfig
    from mmtp.tokenizers.image.vit import ViTImageTokenizer
    from mmtp.tokenizers.quantizers import FSQ

    stack = TransformerConfig(width=24, depth=1, num_heads=2, mlp_width=32)
    return ViTImageTokenizer.Config(patch=4, tile=16, encoder=stack, decoder=stack, quantizer=FSQ.Config()).build().eval(), PICTURES


def image_1d():
    from mmtp.tokenizers.image.one_d import OneDImageTokenizer
    from mmtp.tokenizers.image.transformer import TransformerConfig
    from mmtp.tokenizers.quantizers import ResidualFSQ

    stack = TransformerConfig(width=24, depth=1, num_heads=2, mlp_width=32)
    config = OneDImageTokenizer.Config(size=(24, 16), patch=8, num_latents=3, encoder=stack, decoder=stack, quantizer=ResidualFSQ.Config())
    return config.build().eval(), [torch.ones(3, 24, 16), torch.rand(3, 24, 16, generator=torch.Generator().manual_seed(0))]


def audio_conv():
    from mmtp.tokenizers.audio.conv import ConvAudioTokenizer
    from mmtp.tokenizers.quantizers import FSQ

    return ConvAudioTokenizer.Config(strides=(4, 5), encoder_width=4, decoder_width=4, quantizer=FSQ.Config()).build().eval(), SOUNDS


def audio_frame():
    from mmtp.tokenizers.audio.frame import FrameAudioTokenizer
    from mmtp.tokenizers.quantizers import ResidualFSQ

    return FrameAudioTokenizer.Config(window=80, hop=20, width=16, quantizer=ResidualFSQ.Config()).build().eval(), SOUNDS


def text():
    from mmtp.tokenizers.text import TextTokenizer

    return TextTokenizer.train(TEXTS * 2, 280), TEXTS


def timm_vit():
    from mmtp.tokenizers.continuous.vit import TimmViT

    options = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 4, "pos_embed_grid_size": [4, 4]}
    return TimmViT.Config(model="naflexvit_base_patch16_gap", options=options, max_patches=20).build().eval(), PICTURES


def pretrained(name):
    return lambda: (tokenizer(name), media(name))


MAKERS = {
    "audio-conv": audio_conv,
    "audio-frame": audio_frame,
    "image-1d": image_1d,
    "image-conv": image_conv,
    "image-vit": image_vit,
    "text": text,
    "timm-vit": timm_vit,
    **{name: pretrained(name) for name in SETTINGS},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REGISTRY.names("tokenizer"))
def test_promises_are_kept(name):
    # A KeyError here: a new tokenizer needs a maker above.
    built, given = MAKERS[name]()
    assert isinstance(built, DiscreteTokenizer if built.spec.codebook_sizes else ContinuousTokenizer)
    check_tokenizer(built, given)
