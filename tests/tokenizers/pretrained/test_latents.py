import pytest
import torch

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
    whole = built.decode(latents)
    assert [tuple(p.shape) for p in whole] == [(3, 16, 16), (3, 12, 24), (3, 4, 8)]
    sizes = torch.tensor([p.shape[1:] for p in batch])
    for cropped, back, picture in zip(built.decode(latents, sizes), whole, batch, strict=True):
        assert cropped.shape == picture.shape
        assert torch.equal(cropped, back[:, : picture.shape[1], : picture.shape[2]])
        assert cropped.amin() >= 0 and cropped.amax() <= 1


def test_no_noise_is_drawn():
    built, batch = tokenizer("autoencoder-kl"), media("autoencoder-kl")
    state = torch.random.get_rng_state()
    first = built.encode(batch).values
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(built.encode(batch).values, first)
