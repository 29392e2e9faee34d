"""Every registered tokenizer keeps the promises of ``mmtp/tokenizers/base.py``."""

import pytest
import torch

from mmtp.registry import REGISTRY
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.base import ContinuousTokenizer, DiscreteTokenizer
from tests.tokenizers.pretrained.common import SETTINGS, media, tokenizer

PICTURES = [torch.rand(3, 17, 30, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 1, 1), torch.ones(3, 24, 16)]
TEXTS = ["", "draw a blue circle", "Ünïcode 漢字 🙂 \u202e\x00\r\n ", "a" * 300]


def image_conv():
    from mmtp.tokenizers.image.conv import ConvImageTokenizer
    from mmtp.tokenizers.quantizers import FSQ

    config = ConvImageTokenizer.Config(widths=(8, 16), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=FSQ.Config(levels=(5, 5, 5)))
    return config.build().eval(), PICTURES


def text():
    from mmtp.tokenizers.text import TextTokenizer

    return TextTokenizer.train(TEXTS * 2, 280), TEXTS


def pretrained(name):
    return lambda: (tokenizer(name), media(name))


MAKERS = {"image-conv": image_conv, "text": text, **{name: pretrained(name) for name in SETTINGS}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REGISTRY.names("tokenizer"))
def test_promises_are_kept(name):
    # A KeyError here: a new tokenizer needs a maker above.
    built, given = MAKERS[name]()
    assert isinstance(built, DiscreteTokenizer if built.spec.codebook_sizes else ContinuousTokenizer)
    check_tokenizer(built, given)
