from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp import from_pretrained, save_pretrained
from mmtp.config import ConfigError, build_config
from mmtp.tokenizers.audio.codec import AudioShapeError, AudioValueError
from mmtp.tokenizers.base import EncodeOnlyError
from mmtp.tokenizers.continuous.base import LatentsError
from mmtp.tokenizers.continuous.patches import PatchAudioTokenizer, PatchImageTokenizer
from mmtp.tokenizers.image.grid import ImageShapeError, ImageValueError


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


def sound(samples: int) -> torch.Tensor:
    return torch.rand(1, samples, generator=torch.Generator().manual_seed(samples)) * 2 - 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3), st.integers(1, 9))
def test_pictures_come_back_bit_for_bit(sizes, patch):
    tokenizer, media = PatchImageTokenizer.Config(patch=patch).build(), [picture(*size) for size in sizes]
    latents = tokenizer.encode(media)
    assert all(torch.equal(back, medium) for back, medium in zip(tokenizer.decode(latents), media, strict=True))


def test_a_vector_holds_its_patch():
    latents = PatchImageTokenizer.Config(patch=4).build().encode([given := picture(9, 13)])
    assert latents.coordinates[0, 5].tolist() == [1, 1]
    assert torch.equal(latents.values[0, 5].view(3, 4, 4), given[:, 4:8, 4:8])
    assert torch.equal(latents.values[0, -1].view(3, 4, 4), given[:, 8:9, 12:13].expand(3, 4, 4))


def test_a_patch_embedding_reads_them_as_a_convolution_reads_pixels():
    convolution = torch.nn.Conv2d(3, 7, 4, 4)
    given = picture(8, 12)
    values = PatchImageTokenizer.Config(patch=4).build().encode([given]).values
    expected = convolution(given[None]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(values @ convolution.weight.flatten(1).T + convolution.bias, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_thin_pictures_are_exact(size):
    tokenizer = PatchImageTokenizer.Config(patch=16).build()
    latents = tokenizer.encode([given := picture(*size)])
    assert latents.lengths.tolist() == [tokenizer.num_tokens(size)] == [-(-max(size) // 16)]
    assert torch.equal(tokenizer.decode(latents)[0], given)


def test_bad_pictures_and_latents_are_refused():
    tokenizer = PatchImageTokenizer.Config(patch=4).build()
    with pytest.raises(ImageShapeError, match="picture 0: "):
        tokenizer.encode([torch.zeros(3, 4, 0)])
    with pytest.raises(ImageValueError, match="picture 1: .* is inf"):
        tokenizer.encode([picture(4, 4), torch.full((3, 4, 4), torch.inf)])
    latents = tokenizer.encode([picture(8, 8)])
    with pytest.raises(LatentsError, match="item 0: latents are 47 wide, 48 wanted"):
        tokenizer.decode(replace(latents, values=latents.values[..., :47]))
    with pytest.raises(LatentsError, match="item 0: 3 latents are not those of a whole grid"):
        tokenizer.decode(replace(latents, lengths=torch.tensor([3])))
    assert tokenizer.decode(tokenizer.encode([])) == []


@pytest.mark.parity
def test_spectra_are_those_of_the_audio_spectrogram_transformer():
    from transformers import ASTFeatureExtractor

    given = sound(16000)
    theirs = ASTFeatureExtractor(max_length=98)(given[0].numpy(), sampling_rate=16000, return_tensors="pt").input_values[0]
    torch.testing.assert_close(PatchAudioTokenizer.Config().build().spectrogram(given), theirs, atol=1e-5, rtol=1e-5)


def test_patches_overlap_as_in_the_audio_spectrogram_transformer():
    """Ten seconds: 1,212 patches, 12 along the bands (section 2.1); with the last rest of them ours are one column of patches more."""
    tokenizer = PatchAudioTokenizer.Config(stride=(10, 10)).build()
    assert tokenizer.grid((1024 * 160 + 240,)) == (102, 12)
    given = sound(16000)
    latents, mel = tokenizer.encode([given]), tokenizer.spectrogram(given)
    place = latents.coordinates[0].tolist().index([2, 3])
    torch.testing.assert_close(latents.values[0, place].view(16, 16), mel[20:36, 30:46])


@pytest.mark.parametrize("samples", [1, 399, 400, 401, 2800, 2801, 5000])
def test_every_sample_is_in_a_patch(samples):
    tokenizer, given = PatchAudioTokenizer.Config().build(), sound(samples)
    latents = tokenizer.encode([given])
    assert latents.lengths.tolist() == [tokenizer.num_tokens((samples,))]
    changed = given.clone()
    changed[0, -1] += 1
    assert not torch.equal(tokenizer.encode([changed]).values, latents.values)
    frames = 16 * tokenizer.grid((samples,))[0]
    assert (frames - 17) * 160 + 400 < samples or frames == 16  # and no patch is silence alone


def test_long_sounds_in_passes_are_the_sound_as_a_whole(monkeypatch):
    tokenizer, given = PatchAudioTokenizer.Config().build(), sound(16000)
    whole = tokenizer.encode([given]).values
    monkeypatch.setattr("mmtp.tokenizers.continuous.patches.FRAMES_PER_PASS", 13)
    torch.testing.assert_close(tokenizer.encode([given]).values, whole)


def test_silence_is_finite_and_even():
    values = PatchAudioTokenizer.Config().build().encode([torch.zeros(1, 4000)]).values
    assert values.isfinite().all() and values.unique().numel() == 1


def test_bad_sounds_are_refused():
    tokenizer = PatchAudioTokenizer.Config().build()
    for bad, error, words in [
        (torch.zeros(1, 0), AudioShapeError, "sound 1: has no samples"),
        (torch.zeros(2, 400), AudioShapeError, "sound 1: .*mix channels down"),
        (torch.full((1, 400), torch.nan), AudioValueError, "sound 1: sample 0 is nan"),
    ]:
        with pytest.raises(error, match=words):
            tokenizer.encode([sound(400), bad])
    with pytest.raises(EncodeOnlyError, match="PatchAudioTokenizer has no decoder"):
        tokenizer.decode(tokenizer.encode([sound(400)]))


def test_folders_hold_no_weights(tmp_path):
    built = PatchAudioTokenizer.Config(bands=32, patch=(8, 16), stride=(8, 16)).build()
    loaded = from_pretrained(save_pretrained(built, tmp_path))
    assert loaded.config == built.config and loaded.spec == built.spec
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert PatchAudioTokenizer.Config().build().spec.fingerprint != built.spec.fingerprint


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("image-patches", {"patch": 0}, "patch 0: at least 1"),
        ("audio-patches", {"stride": [17, 16]}, "stride .*nothing is left out"),
        ("audio-patches", {"bands": 8}, "bands 8: at least as many as a patch has"),
        ("audio-patches", {"frame_shift": 0.01}, "less than a sample at 16000 Hz"),
        ("audio-patches", {"std": 0}, "std 0.0: more than 0"),
    ],
)
def test_configuration_names_what_is_wrong(name, change, words):
    with pytest.raises(ConfigError, match=words):
        build_config("tokenizer", {"type": name, **change})
