import pytest
import torch

from mmtp.tokenizers.base import EncodeOnlyError
from mmtp.tokenizers.pretrained import DiffusersVQ, PretrainedError
from mmtp.types import Codes, Modality
from tests.tokenizers.pretrained.common import QUANTIZERS, media, theirs, tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_spec(name):
    spec = tokenizer(name).spec
    assert (spec.modality, spec.codebook_sizes, spec.downsampling) == (Modality.IMAGE, (32,), (4, 4))
    assert (spec.channels, spec.value_range, spec.sample_rate) == (3, (0, 1), None)


@pytest.mark.parametrize("name", ["emu3-vq", "diffusers-vq"])
def test_any_size_is_padded_by_its_border_and_cropped(name):
    built, picture = tokenizer(name), torch.rand(3, 9, 22)
    padded = torch.cat([picture, picture[:, -1:].expand(-1, 3, -1)], 1)
    padded = torch.cat([padded, padded[:, :, -1:].expand(-1, -1, 2)], 2)
    codes = built.encode([picture])
    assert torch.equal(codes.ids, built.encode([padded]).ids)
    (back,) = built.decode(codes)
    (whole,) = built.decode(Codes(codes.ids, codes.lengths))
    assert whole.shape == (3, 12, 24) and torch.equal(back, whole[:, :9, :22])


def test_janus_refuses_pictures_that_do_not_fill_its_grid():
    built = tokenizer("janus-vq")
    message = "a picture of 8x16 pixels has 2x4 cells, this JanusVQVAE only 4x4: resize to 16x16"
    with pytest.raises(PretrainedError, match=message):
        built.encode([torch.rand(3, 16, 16), torch.rand(3, 8, 16)])
    with pytest.raises(PretrainedError, match=message):
        built.grid((8, 16))
    assert built.num_tokens((13, 16)) == 16


def test_chameleon_only_encodes():
    built = tokenizer("chameleon-vq")
    with pytest.raises(EncodeOnlyError, match="ChameleonVQVAE has no decoder"):
        built.decode(built.encode(media("chameleon-vq")))


@pytest.mark.parametrize("lookup", [True, False])
def test_diffusers_model_decodes_ids_however_it_was_saved(lookup):
    built = DiffusersVQ.wrap(theirs("diffusers-vq", lookup_from_codebook=lookup))
    assert built.config.model["lookup_from_codebook"] is lookup
    expected = tokenizer("diffusers-vq")
    codes = expected.encode(media("diffusers-vq"))
    assert all(torch.equal(a, b) for a, b in zip(built.decode(codes), expected.decode(codes), strict=True))
