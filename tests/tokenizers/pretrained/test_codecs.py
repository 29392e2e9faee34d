import pytest
import torch

from mmtp.tokenizers.pretrained import Encodec, Mimi, PretrainedError
from mmtp.types import Codes, Modality
from tests.tokenizers.pretrained.common import CODECS, media, theirs, tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.mark.parametrize(("name", "sizes", "hop", "rate"), [("encodec", 4, 12, 1200), ("dac", 3, 6, 1200), ("mimi", 4, 12, 2400)])
def test_spec(name, sizes, hop, rate):
    spec = tokenizer(name).spec
    assert (spec.modality, spec.codebook_sizes, spec.downsampling) == (Modality.AUDIO, (16,) * sizes, (hop,))
    assert (spec.sample_rate, spec.value_range, spec.channels) == (rate, (-1, 1), 1)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("length", [1, 11, 12, 13, 37, 60])
def test_every_length_comes_back(name, length):
    built, sound = tokenizer(name), torch.rand(1, length) * 2 - 1
    codes = built.encode([sound])
    assert tuple(codes.lengths[0]) == built.grid((length,)) == (-(-length // built.spec.downsampling[0]),)
    assert codes.sizes is not None and codes.sizes.tolist() == [[length]]
    assert built.decode(codes)[0].shape == sound.shape
    assert built.decode(Codes(codes.ids, codes.lengths))[0].shape == (1, built.grid((length,))[0] * built.spec.downsampling[0])


@pytest.mark.parametrize("name", CODECS)
def test_fewer_codebooks_are_the_first_ones(name):
    whole, batch = tokenizer(name), media(name)
    expected = whole.encode(batch)
    for count in range(1, whole.spec.num_codebooks):
        built = tokenizer(name, num_codebooks=count)
        codes = built.encode(batch)
        assert torch.equal(codes.ids, expected.ids[:, :count])
        assert built.spec.fingerprint != whole.spec.fingerprint
        assert built.num_tokens((48,)) == count * whole.grid((48,))[0]
        coarse = whole.decode(codes)
        assert all(torch.equal(a, b) for a, b in zip(coarse, built.decode(codes), strict=True))
        assert not torch.equal(coarse[0], whole.decode(expected)[0])


@pytest.mark.parametrize("count", [0, 5])
def test_codebooks_that_the_model_lacks_are_refused(count):
    with pytest.raises(PretrainedError, match=f"num_codebooks is {count}; this MimiModel has 1 to 4"):
        tokenizer("mimi", num_codebooks=count)


@pytest.mark.parametrize("setting", [{"normalize": True}, {"chunk_length_s": 1.0, "overlap": 0.01}])
def test_encodec_that_needs_scales_is_refused(setting):
    with pytest.raises(PretrainedError, match="needs scales beside its codes"):
        Encodec.wrap(theirs("encodec", **setting))


def test_stereo_encodec():
    built = Encodec.wrap(theirs("encodec", audio_channels=2))
    sound = torch.rand(2, 30)
    (back,) = built.decode(built.encode([sound]))
    assert back.shape == sound.shape


def test_dac_ends_in_silence_where_its_decoder_is_short():
    built = tokenizer("dac")
    codes = built.encode([torch.rand(1, 48)])
    short = built.model.decode(audio_codes=codes.ids).audio_values.shape[1]
    assert short < 48
    (back,) = built.decode(codes)
    assert back[:, :short].all() and not back[:, short:].any()


def test_mimi_notices_new_codebooks():
    built, batch = tokenizer("mimi"), media("mimi")
    before = built.encode(batch).ids
    other = Mimi.wrap(theirs("mimi", seed=1))
    built.load_state_dict(other.state_dict())
    assert torch.equal(built.encode(batch).ids, other.encode(batch).ids)
    assert not torch.equal(built.encode(batch).ids, before)
    codes = other.encode(batch)
    assert all(torch.equal(a, b) for a, b in zip(built.decode(codes), other.decode(codes), strict=True))
