"""What holds for every picture tokenizer, whatever its network."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtp.config import ConfigError
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.audio.frame import FrameAudioTokenizer
from mmtp.tokenizers.image import grid
from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.image.grid import ImageCodesError, ImageShapeError, ImageValueError
from mmtp.tokenizers.image.one_d import OneDImageTokenizer
from mmtp.tokenizers.image.tiling import Tiling
from mmtp.tokenizers.image.transformer import TransformerConfig
from mmtp.tokenizers.quantizers import VQ, MultiScaleVQ, ResidualVQ
from mmtp.types import Codes, Modality

CELL = 4
anything = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small_passes(monkeypatch):
    """Passes of 16 x 16 cells."""
    monkeypatch.setattr(grid, "PIXELS_PER_PASS", (16 * CELL) ** 2)


def test_codes_tell_pictures_apart(anyone, noise):
    """Else most tests of this file would hold of a constant."""
    codes = anyone.encode(noise(*[(16, 24)] * 8)).ids
    assert len({tuple(item.flatten().tolist()) for item in codes}) == 8
    assert all(len(codes[:, k].unique()) > 5 for k in range(codes.shape[1]))


@anything
@given(height=st.integers(1, 60), width=st.integers(1, 60))
def test_any_size_comes_back_at_its_size(cells, height, width):
    picture = torch.rand(3, height, width)
    codes = cells.encode([picture])
    assert tuple(codes.lengths[0].tolist()) == cells.grid((height, width)) == (math.ceil(height / CELL), math.ceil(width / CELL))
    assert codes.sizes.tolist() == [[height, width]]
    assert codes.ids[0].numel() == cells.num_tokens((height, width))
    (back,) = cells.decode(codes)
    assert back.shape == picture.shape
    assert 0 <= back.min() <= back.max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000)])
def test_pictures_as_small_and_as_long_as_can_be(cells, noise, size):
    codes = cells.encode(noise(size))
    assert codes.ids.shape[2:] == tuple(math.ceil(n / CELL) for n in size)
    assert cells.decode(codes)[0].shape == (3, *size)


@anything
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_padding_is_repeating_the_border(cells, height, width):
    picture = torch.rand(3, height, width)
    rows, columns = (torch.arange(CELL * math.ceil(n / CELL)).clamp(max=n - 1) for n in (height, width))
    repeated = picture[:, rows][:, :, columns]
    assert torch.equal(cells.encode([picture]).ids, cells.encode([repeated]).ids)


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_codes_are_those_of_the_picture_alone_in_any_batch(anyone, noise, batch):
    media = noise(*[(16, 24)] * batch)
    together = anyone.encode(media)
    backwards = anyone.encode(media[::-1])
    for i in range(0, batch, 5):
        alone = anyone.encode([media[i]])
        assert torch.equal(together.item(i), alone.item(0))
        assert torch.equal(backwards.item(batch - 1 - i), alone.item(0))


def test_pictures_of_other_sizes_beside_it_change_nothing(cells, noise):
    media = noise((16, 24), (9, 40), (16, 24), (50, 50), (1, 3))
    together = cells.encode(media)
    for i, medium in enumerate(media):
        assert torch.equal(together.item(i), cells.encode([medium]).item(0))


def test_no_pass_is_larger_than_a_tile(cells, noise, small_passes):
    seen = []
    hooks = [net.register_forward_pre_hook(lambda net, args: seen.append((net, args[0].shape))) for net in (cells.encoder, cells.decoder)]
    codes = cells.encode(noise((150, 230), (20, 20)))
    cells.decode(codes)
    for hook in hooks:
        hook.remove()
    side = cells.tiling.side
    assert side <= 24
    for net, (batch, _, height, width) in seen:
        pixels_per_step = CELL if net is cells.encoder else 1
        assert batch * height * width <= (side * pixels_per_step) ** 2
    assert len(seen) > 2 * (150 * 230) / (side * CELL) ** 2


@pytest.mark.parametrize("bad", [torch.rand(1, 8, 8), torch.rand(8, 8), torch.rand(3, 0, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_pictures_of_another_shape_are_refused(anyone, noise, bad):
    with pytest.raises(ImageShapeError, match=r"^picture 1: .* \[3, height, width\] wanted$"):
        anyone.encode([*noise((16, 24)), bad])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(anyone, noise, bad):
    good, other = noise((16, 24), (16, 24))
    other[2, 3, 1] = bad
    with pytest.raises(ImageValueError, match=rf"^picture 1: channel 2 of row 3, column 1 is {bad:g}, numbers in \[0, 1\] are wanted$"):
        anyone.encode([good, other])


def test_codes_of_another_tokenizer_are_refused(anyone, noise):
    codes = anyone.encode(noise((16, 24)))
    high = codes.ids.clone()
    high[0, 0, 0, -1] = 125
    for ids, words in (
        (high, r"to 125 of codebook 0 given, 0 to 124 wanted"),
        (codes.ids - 200, "codes -"),
        (codes.ids[:, :0], "codes of 0 c"),
    ):
        with pytest.raises(ImageCodesError, match=words):
            anyone.decode(dataclasses.replace(codes, ids=ids))
    with pytest.raises(ImageCodesError, match=r"codes of 4 codebooks given, 1 to [13] wanted"):
        anyone.decode(dataclasses.replace(codes, ids=codes.ids[:, :1].repeat(1, 4, 1, 1)))


def test_first_codebooks_are_a_lower_bit_rate(one_d, noise):
    codes = one_d.encode(noise((16, 24)))
    coarse, fine = one_d.decode(dataclasses.replace(codes, ids=codes.ids[:, :1])), one_d.decode(codes)
    assert coarse[0].shape == fine[0].shape
    assert not torch.equal(coarse[0], fine[0])
    assert one_d.codebook_vectors(2).shape == (125, 24)


def test_empty_batch(anyone):
    codes = anyone.encode([])
    assert codes.ids.shape == (0, len(anyone.spec.codebook_sizes), 0, 0)
    assert anyone.decode(codes) == []


def test_spec(anyone):
    spec = anyone.spec
    assert (spec.modality, spec.channels, spec.value_range) == (Modality.IMAGE, 3, (0.0, 1.0))
    grid_of = anyone.grid((16, 24))
    covered = [n * cell for n, cell in zip(grid_of, spec.downsampling, strict=True)]
    assert all(a >= b for a, b in zip(covered, (16, 24), strict=True))


def test_mode_and_autocast_do_not_change_codes(anyone, noise):
    batch = noise((16, 24))
    expected = anyone.encode(batch).ids
    anyone.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(anyone.encode(batch).ids, expected)
    assert anyone.training
    anyone.eval()


def test_training_reaches_every_weight(anyone, noise):
    anyone.train()
    pixels = torch.stack(noise(*[(16, 24)] * 4)) * 2 - 1
    output, quantized = anyone(pixels)
    ((output - pixels).square().mean() + quantized.loss).backward()
    anyone.eval()
    for name, parameter in anyone.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    anyone.zero_grad(set_to_none=True)


def test_training_gives_what_decoding_gives(anyone, noise):
    """Forward pass of training and encode-decode are one function up to the range."""
    (picture,) = noise((16, 24))
    with torch.no_grad():
        output, _ = anyone(picture[None] * 2 - 1)
    (back,) = anyone.decode(anyone.encode([picture]))
    torch.testing.assert_close(output[0].add(1).div(2).clamp(0, 1), back)


def test_training_takes_whole_cells_only(cells):
    with pytest.raises(ImageShapeError, match="pictures of 9x8 pixels given, whole cells are wanted: 12x8"):
        cells(torch.rand(1, 3, 9, 8))


def test_without_sizes_whole_cells_come_back(cells, noise):
    codes = cells.encode(noise((10, 10)))
    assert cells.decode(Codes(codes.ids, codes.lengths))[0].shape == (3, 12, 12)


@pytest.fixture(scope="module")
def scaled():
    """A picture of 16 x 16 pixels as 1 + 4 + 16 codes."""
    quantizer = MultiScaleVQ.Config(scales=(1, 2, 4), codebook_size=24, codebook_dim=6, convolutions=2)
    config = ConvImageTokenizer.Config(patch=2, widths=(8, 12), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=quantizer)
    torch.manual_seed(0)
    tokenizer = config.build()
    tokenizer(torch.rand(8, 3, 16, 16) * 2 - 1)  # starts the codebook
    return tokenizer.eval()


def test_scales_keep_the_promises(scaled, noise):
    check_tokenizer(scaled, noise((16, 16), (13, 15), (16, 14)))
    codes = scaled.encode(noise(*[(16, 16)] * 4))
    assert scaled.spec.scales == (1, 2, 4)
    assert codes.ids.shape == (4, 1, 1, 21)
    assert len(codes.ids.unique()) > 8
    covered = [n * cell for n, cell in zip((1, 21), scaled.spec.downsampling, strict=True)]
    assert all(most >= 16 for most in covered)
    assert scaled.codebook_vectors().shape == (24, 12)


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_scales_in_any_batch(scaled, noise, batch):
    media = noise(*[(16, 16)] * batch)
    together = scaled.encode(media)
    assert all(torch.equal(together.item(i), scaled.encode([media[i]]).item(0)) for i in range(0, batch, 5))


def test_first_scales_are_a_coarser_picture(scaled, noise):
    (picture,) = noise((16, 13))
    codes = scaled.encode([picture])
    seen = []
    for end in (1, 5, 21):
        first = Codes(codes.ids[..., :end], torch.tensor([[1, end]]), codes.sizes)
        seen += scaled.decode(first)
    assert all(back.shape == picture.shape for back in seen)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], scaled.decode(codes)[0])
    with pytest.raises(ImageCodesError, match=r"^picture 0: a grid of \[1, 6\] codes given; a row of the first scales has 1, 5, 21$"):
        scaled.decode(Codes(codes.ids[..., :6], torch.tensor([[1, 6]])))


def test_scales_take_pictures_of_one_size(scaled, noise):
    with pytest.raises(ImageShapeError, match="^picture 1: 20 pixels high and 16 wide given, .* end with 4x4: resize or crop to 16x16$"):
        scaled.encode(noise((16, 16), (20, 16)))
    with pytest.raises(ImageShapeError, match="whole cells are wanted: 16x16"):
        scaled(torch.rand(1, 3, 15, 16))
    bad = torch.full((3, 16, 16), math.nan)
    with pytest.raises(ImageValueError, match="channel 0 of row 0"):
        scaled.encode([bad])


def test_scales_on_a_tiled_decoder(scaled, noise, monkeypatch):
    """Pictures larger than a tile: latents are quantized as a whole, the networks see tiles."""
    whole = scaled.encode(noise((16, 16)))
    expected = scaled.decode(whole)[0]
    monkeypatch.setattr(type(scaled), "tiling", Tiling(side=3, encoder_overlap=2, decoder_overlap=2, blend=False))
    assert scaled.decode(whole)[0].shape == expected.shape
    assert scaled.encode(noise((16, 16))).ids.shape == whole.ids.shape


def test_scales_want_a_square_grid():
    quantizer = MultiScaleVQ.Config(scales=(1, 2), codebook_size=8, convolutions=1)
    stack = TransformerConfig(width=24, depth=1, num_heads=2, mlp_width=32)
    with pytest.raises(ConfigError, match="quantizer: one of scales codes square grids of latents; here they are a row of tokens"):
        OneDImageTokenizer.Config(size=(16, 16), patch=8, num_latents=4, encoder=stack, decoder=stack, quantizer=quantizer).build()
    with pytest.raises(ConfigError, match="here they are a row of frames"):
        FrameAudioTokenizer.Config(window=80, hop=20, width=16, quantizer=quantizer).build()


@pytest.mark.parametrize("quantizer", [VQ.Config(codebook_size=16, codebook_dim=4), ResidualVQ.Config(num_codebooks=2, codebook_size=16)])
def test_encoding_in_training_mode_moves_no_codebook(quantizer, noise):
    """A forward pass in training mode moves codebooks without any optimizer, and gives latents that are not those of its codes."""
    config = ConvImageTokenizer.Config(patch=2, widths=(8, 12), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=quantizer)
    tokenizer, media = config.build(), noise((16, 24), (9, 9))
    for started in (False, True):
        if started:
            tokenizer(torch.stack(noise((16, 16), (16, 16))))
        fingerprint = tokenizer.spec.fingerprint
        codes = tokenizer.train().encode(media)
        tokenizer.decode(codes)
        assert tokenizer.training and tokenizer.spec.fingerprint == fingerprint
        assert torch.equal(tokenizer.eval().encode(media).ids, codes.ids)
    check_tokenizer(config.build().eval(), media)
