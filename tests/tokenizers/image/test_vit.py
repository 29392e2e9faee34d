import copy
import dataclasses

import pytest
import torch
from einops import rearrange

from mmtp.config import ConfigError, build_config
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.image.vit import ViTImageTokenizer
from mmtp.tokenizers.quantizers import VQ


def test_conforms(vit, noise):
    check_tokenizer(vit, noise((16, 16), (13, 22), (16, 16), (1, 1), (70, 62)))


def test_conforms_with_a_learned_codebook(vit, noise):
    tokenizer = dataclasses.replace(vit.config, quantizer=VQ.Config(codebook_size=16, codebook_dim=4)).build()
    tokenizer(torch.rand(2, 3, 32, 32))
    check_tokenizer(tokenizer.eval(), noise((16, 16), (9, 21)))


def test_a_code_sees_the_whole_picture(vit):
    pixels = torch.rand(1, 3, 24, 40, requires_grad=True)
    vit.encoder(pixels)[..., 2, 3].square().sum().backward()
    assert (pixels.grad != 0).all()


def test_rows_and_columns_are_told_apart(vit, noise):
    """Patches in another order are another picture."""
    (picture,) = noise((16, 16))
    cells = rearrange(picture, "c (h p) (w q) -> h w c p q", p=4, q=4)
    turned = rearrange(cells.transpose(0, 1), "h w c p q -> c (h p) (w q)")
    codes, others = (vit.encode([p]).ids[0, 0] for p in (picture, turned))
    assert not torch.equal(codes.T, others)


@torch.no_grad()
def test_tiles_that_agree_join_to_the_whole(vit, noise, monkeypatch):
    """Encoder and decoder without blocks see one patch each: weights of tiles add up to 1 everywhere."""
    vit = copy.deepcopy(vit)
    vit.encoder.transformer.blocks = vit.decoder.transformer.blocks = torch.nn.ModuleList()
    (picture,) = noise((150, 210))
    codes = vit.encode([picture])
    tiled, (back,) = vit._encoded([picture], 38, 53), vit.decode(codes)
    monkeypatch.setattr(ViTImageTokenizer, "tiling", None)
    torch.testing.assert_close(tiled, vit._encoded([picture], 38, 53))
    torch.testing.assert_close(back, vit.decode(codes)[0])


@torch.no_grad()
def test_where_tiles_do_not_overlap_latents_are_their_own(vit, noise):
    """Tiles of 16 x 16 cells that share 4: the first 12 columns are the first tile's alone."""
    (picture,) = noise((64, 112))
    joined = vit._encoded([picture], 16, 28)
    tile, other = (vit.encoder(part[None] * 2 - 1) for part in (picture[..., :64], picture[..., 48:]))
    torch.testing.assert_close(joined[..., :12], tile[..., :12])
    torch.testing.assert_close(joined[..., 16:], other[..., 4:])
    torch.testing.assert_close(joined[..., 13], 0.625 * tile[..., 13] + 0.375 * other[..., 1])
    assert (tile[..., 12:] - other[..., :4]).abs().max() > 0.1


def test_pictures_up_to_a_tile_pass_whole(vit, noise):
    seen = []
    hook = vit.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    vit.encode(noise((64, 64), (32, 128), (64, 68)))
    hook.remove()
    assert seen == [(64, 64), (32, 128), (64, 64), (64, 64)]


@pytest.mark.parametrize(("change", "words"), [({"patch": 0}, "patch 0: at least 1"), ({"tile": 500}, "tile 500: a multiple of patch 8")])
def test_configuration_names_what_is_wrong(change, words):
    with pytest.raises(ConfigError, match=words):
        build_config("tokenizer", {"type": "image-vit", **change})


def test_configuration_comes_back_from_plain_values(vit):
    assert build_config("tokenizer", vit.config.to_dict()) == vit.config
    assert build_config("tokenizer", {"type": "image-vit"}) == ViTImageTokenizer.Config()
