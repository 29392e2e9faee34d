from dataclasses import replace

import pytest
import torch

from mmtp.tokenizers.continuous.base import LatentsError
from mmtp.types import Modality
from tests.tokenizers.pretrained.common import AUTOENCODERS, media, tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.mark.parametrize(("name", "width"), [("autoencoder-kl", 4), ("autoencoder-dc", 8)])
def test_spec(name, width):
    spec = tokenizer(name).spec
    assert (spec.modality, spec.codebook_sizes, spec.latent_dim) == (Modality.IMAGE, (), width)
    assert (spec.downsampling, spec.channels, spec.value_range) == ((4, 4), 3, (0, 1))


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_positions_and_way_back(name):
    built, batch = tokenizer(name), media(name)
    latents = built.encode(batch)
    assert latents.lengths.tolist() == [built.num_tokens(p.shape[1:]) for p in batch] == [16, 18, 2]
    assert latents.coordinates[1, :18].tolist() == [[r, c] for r in range(3) for c in range(6)]
    assert latents.sizes.tolist() == [list(p.shape[1:]) for p in batch]
    whole = built.decode(replace(latents, sizes=None))
    assert [tuple(p.shape) for p in whole] == [(3, 16, 16), (3, 12, 24), (3, 4, 8)]
    for cropped, back, picture in zip(built.decode(latents), whole, batch, strict=True):
        assert cropped.shape == picture.shape
        assert torch.equal(cropped, back[:, : picture.shape[1], : picture.shape[2]])
        assert cropped.amin() >= 0 and cropped.amax() <= 1


def test_no_noise_is_drawn():
    built, batch = tokenizer("autoencoder-kl"), media("autoencoder-kl")
    state = torch.random.get_rng_state()
    first = built.encode(batch).values
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(built.encode(batch).values, first)


def test_latents_of_another_tokenizer_are_refused():
    built = tokenizer("autoencoder-kl")
    latents = built.encode(media("autoencoder-kl"))
    with pytest.raises(LatentsError, match="item 0: latents are 3 wide, 4 wanted"):
        built.decode(replace(latents, values=latents.values[..., :3]))
    with pytest.raises(LatentsError, match="item 1: 17 latents are not those of a whole grid"):
        built.decode(replace(latents, lengths=torch.tensor([16, 17, 2])))


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_no_pictures_no_latents(name):
    built = tokenizer(name)
    latents = built.encode([])
    assert tuple(latents.values.shape) == (0, 0, built.spec.latent_dim)
    assert built.decode(latents) == []
