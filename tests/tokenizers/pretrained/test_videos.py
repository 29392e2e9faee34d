import pytest
import torch

from mmtp.tokenizers.pretrained import PretrainedError, VidTok
from mmtp.types import Codes, Modality
from tests.tokenizers.pretrained.common import media, theirs, tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def test_spec():
    spec = tokenizer("vidtok").spec
    assert (spec.modality, spec.codebook_sizes, spec.downsampling) == (Modality.VIDEO, (64,), (2, 4, 4))
    assert (spec.channels, spec.value_range, spec.sample_rate) == (3, (0, 1), None)


def test_any_extent_is_padded_by_its_end_and_its_border_and_cropped():
    built, video = tokenizer("vidtok"), media("vidtok")[1]
    assert video.shape == (3, 4, 9, 6)
    t, rows, columns = (torch.arange(n).clamp(max=size - 1) for n, size in zip((5, 12, 8), video.shape[1:], strict=True))
    codes = built.encode([video])
    assert torch.equal(codes.ids, built.encode([video[:, t][:, :, rows][:, :, :, columns]]).ids)
    (back,), (whole,) = built.decode(codes), built.decode(Codes(codes.ids, codes.lengths))
    assert whole.shape == (3, 5, 12, 8) and torch.equal(back, whole[:, :4, :9, :6])


def test_the_first_frame_is_coded_alone():
    built, video = tokenizer("vidtok"), media("vidtok")[0]
    assert torch.equal(built.encode([video]).ids[:, :, :1], built.encode([video[:, :1]]).ids)


@pytest.mark.parametrize("settings", [{"regularizer": "kl"}, {"is_causal": False}])
def test_models_without_codes_of_any_length_are_refused(settings):
    with pytest.raises(PretrainedError, match="only models with regularizer 'fsq' that are causal"):
        VidTok.wrap(theirs("vidtok", **settings))


def test_media_of_another_shape_are_named():
    with pytest.raises(PretrainedError, match=r"medium 0: .* floats \[3, frames, height, width\] wanted"):
        tokenizer("vidtok").encode([torch.rand(3, 8, 8)])
