"""Every registered tokenizer keeps the promises of ``mmtp/tokenizers/base.py``."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from mmtp.registry import REGISTRY
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.base import ContinuousTokenizer, DiscreteTokenizer, EncodeOnlyError
from mmtp.types import Codes, MmtpError, Modality
from tests.tokenizers.pretrained.common import SETTINGS, media, tokenizer

PICTURES = [torch.rand(3, 17, 30, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 1, 1), torch.ones(3, 24, 16)]
SOUNDS = [torch.rand(1, 333, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.zeros(1, 1), torch.ones(1, 400)]
VIDEOS = [torch.rand(3, 4, 17, 10, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 1, 1, 1), torch.ones(3, 3, 8, 16)]
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


def video_conv():
    from mmtp.tokenizers.quantizers import FSQ
    from mmtp.tokenizers.video.conv import ConvVideoTokenizer

    config = ConvVideoTokenizer.Config(
        widths=(6, 8), time_strides=(2,), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=FSQ.Config(levels=(5, 5, 5))
    )
    return config.build().eval(), VIDEOS


def text():
    from mmtp.tokenizers.text import TextTokenizer

    return TextTokenizer.train(TEXTS * 2, 280), TEXTS


def image_patches():
    from mmtp.tokenizers.continuous.patches import PatchImageTokenizer

    return PatchImageTokenizer.Config(patch=5).build().eval(), PICTURES


def audio_patches():
    from mmtp.tokenizers.continuous.patches import PatchAudioTokenizer

    return PatchAudioTokenizer.Config(sample_rate=4000, bands=16, patch=(4, 8), stride=(3, 8)).build().eval(), SOUNDS


def timm_vit():
    from mmtp.tokenizers.continuous.vit import TimmViT

    options = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 4, "pos_embed_grid_size": [4, 4]}
    return TimmViT.Config(model="naflexvit_base_patch16_gap", options=options, max_patches=20).build().eval(), PICTURES


def pretrained(name):
    return lambda: (tokenizer(name), media(name))


MAKERS = {
    "audio-conv": audio_conv,
    "audio-frame": audio_frame,
    "audio-patches": audio_patches,
    "image-1d": image_1d,
    "image-conv": image_conv,
    "image-patches": image_patches,
    "image-vit": image_vit,
    "text": text,
    "timm-vit": timm_vit,
    "video-conv": video_conv,
    **{name: pretrained(name) for name in SETTINGS},
}


pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
MEDIA = [name for name in REGISTRY.names("tokenizer") if name != "text"]
CONTINUOUS = ["audio-patches", "autoencoder-dc", "autoencoder-kl", "image-patches", "timm-vit"]
ENCODE_ONLY = ["audio-patches", "timm-vit"]


@pytest.mark.parametrize("name", REGISTRY.names("tokenizer"))
def test_promises_are_kept(name):
    # A KeyError here: a new tokenizer needs a maker above.
    built, given = MAKERS[name]()
    assert isinstance(built, DiscreteTokenizer if built.spec.codebook_sizes else ContinuousTokenizer)
    check_tokenizer(built, given)


@pytest.mark.parametrize("count", [8, 32])
@pytest.mark.parametrize("name", MEDIA)
def test_codes_do_not_depend_on_the_size_of_the_batch(name, count):
    built, given = MAKERS[name]()
    alone = [built.encode([medium]).item(0) for medium in given]
    for many in (list(range(len(given))) * count, [0] * count):  # padded, and all of one size
        found = built.encode([given[i] for i in many[:count]])
        assert all(torch.equal(found.item(place), alone[i]) for place, i in enumerate(many[:count]))


@cache
def made(name):
    """A tokenizer and one of its media."""
    built, media = MAKERS[name]()
    return built, next(medium for medium in media if len(medium))


def one_line(built, medium, good):
    """What a tokenizer says of the second medium, or of the second item's codes."""
    with pytest.raises(MmtpError) as caught:
        built.encode([good, medium])
    message = str(caught.value)
    assert "\n" not in message
    assert " 1: " in message, "the message does not say which"
    return message


def with_last(medium, value):
    return medium.flatten().index_fill(0, torch.tensor([medium.numel() - 1]), value).view_as(medium)


def with_channels(medium, channels):
    return medium[:1].expand(channels, *medium.shape[1:])


BAD_MEDIA = {
    "nan": lambda m: with_last(m, float("nan")),
    "infinite": lambda m: with_last(m, float("inf")),
    "minus infinite": lambda m: with_last(m, float("-inf")),
    "infinite in float32": lambda m: with_last(m.double(), 1e300),
    "no samples": lambda m: m[..., :0],
    "no axis of channels": lambda m: m[0],
    "a batch": lambda m: m[None],
    "8 bits": lambda m: m.mul(100).to(torch.uint8),
    "16 bits": lambda m: m.mul(100).to(torch.int16),
    "32 bits": lambda m: m.mul(100).to(torch.int32),
    "64 bits": lambda m: m.mul(100).to(torch.int64),
    "booleans": lambda m: m > 0,
    **{f"{n} channels": lambda m, n=n: with_channels(m, n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8)},
}


@pytest.mark.parametrize("name", MEDIA)
def test_bad_media_are_one_line_that_says_which(name):
    built, medium = made(name)
    for kind, spoil in BAD_MEDIA.items():
        if kind != f"{built.spec.channels} channels":
            assert one_line(built, spoil(medium), medium), kind


@pytest.mark.parametrize("name", MEDIA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_width_are_taken_as_float32(name, dtype):
    built, medium = made(name)
    given, wanted = (built.encode([m]) for m in (medium.to(dtype), medium.to(dtype).float()))
    assert torch.equal(*(c.ids if isinstance(c, Codes) else c.values for c in (given, wanted)))


@pytest.mark.parametrize("name", MEDIA)
def test_media_as_small_long_and_even_as_can_be(name):
    built, medium = made(name)
    channels, least = medium.shape[0], built.spec.value_range[0]
    one, long = {
        Modality.IMAGE: ((1, 1), (1, 10_000)),
        Modality.AUDIO: ((1,), (5_000,)),
        Modality.VIDEO: ((1, 1, 1), (200, 1, 1)),
    }[built.spec.modality]
    own = tuple(medium.shape[1:])
    if name == "chameleon-vq":  # whose tiny model normalises over one channel at a time, and then one cell has no variance
        one = own
    cases = [(one, 0.0), (own, 0.0), (own, least), (own, built.spec.value_range[1])]  # silence, or one colour
    if name == "emu3-vq":  # whose attention sees all cells at once
        long = (1, 1_000)
    if name not in ("image-conv", "image-vit"):  # of which image/test_grid.py has it
        cases.append((long, 0.5))
    for size, fill in cases:
        flat = torch.full((channels, *size), fill)
        if size != own and name in ("image-1d", "janus-vq"):  # which take one size
            with pytest.raises(MmtpError) as caught:
                built.encode([flat])
            assert str(caught.value).count("\n") == 0 and str(size[-1]) in str(caught.value)
            continue
        codes = built.encode([flat])
        if not isinstance(codes, Codes):
            assert codes.values.isfinite().all()
            continue
        assert tuple(codes.lengths[0].tolist()) == built.grid(size)
        if name != "chameleon-vq":
            (back,) = built.decode(codes)
            assert back.shape == flat.shape and back.isfinite().all()


@pytest.mark.parametrize("name", [name for name in REGISTRY.names("tokenizer") if name not in CONTINUOUS])
def test_codes_that_cannot_be_its_own_are_one_line(name):
    built, medium = made(name)
    codes = built.encode([medium])
    (size, *_), count = built.spec.codebook_sizes, built.spec.num_codebooks
    spoiled = {
        "above": torch.full_like(codes.ids, size),
        "below": torch.full_like(codes.ids, -1),
        "too many codebooks": codes.ids[:, :1].expand(-1, count + 1, *codes.ids.shape[2:]),
        "no codebook": codes.ids[:, :0],
    }
    for kind, ids in spoiled.items():
        with pytest.raises(EncodeOnlyError if name == "chameleon-vq" else MmtpError) as caught:
            built.decode(replace(codes, ids=ids))
        assert str(caught.value).count("\n") == 0, kind


@pytest.mark.parametrize("name", [name for name in CONTINUOUS if name not in ENCODE_ONLY])
def test_latents_that_cannot_be_its_own_are_one_line(name):
    built, medium = made(name)
    latents = built.encode([medium])
    for values, words in ((latents.values[..., :-1], "wide"), (latents.values / 0, "not finite")):
        with pytest.raises(MmtpError, match=words):
            built.decode(replace(latents, values=values))
