"""Adapters against direct calls of the models they wrap, on tiny random weights: codes and decoded media are equal, bit for bit.

Those that run quick copies give equal codes too; their media are equal up to rounding in float32.
"""

import pytest
import torch
import torch.nn.functional as F

from mmtp.tokenizers.pretrained.quick import Precision, QuickQuantizer
from tests.tokenizers.pretrained.common import AUTOENCODERS, adapter, media, theirs

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def encodec(model, sound):
    codes, scales, rest = model.encode(sound[None], bandwidth=1.6, return_dict=False)
    return codes[0, 0], model.decode(codes, scales, last_frame_pad_length=rest).audio_values[0, :, : sound.shape[1]]


def dac(model, sound):
    from transformers import DacFeatureExtractor

    extract = DacFeatureExtractor(sampling_rate=1200, hop_length=6)
    padded = extract(sound[0].numpy(), sampling_rate=1200, return_tensors="pt")["input_values"]
    codes = model.encode(padded).audio_codes
    # The model alone comes out short of whole frames.
    short = model.decode(audio_codes=codes).audio_values[:, : sound.shape[1]]
    return codes[0], F.pad(short, (0, sound.shape[1] - short.shape[1]))


def mimi(model, sound):
    codes = model.encode(sound[None]).audio_codes
    return codes[0], model.decode(codes, padding_mask=torch.ones_like(sound[None])).audio_values[0]


def pixels(picture):
    return F.pad(picture[None] * 2 - 1, (0, -picture.shape[2] % 4, 0, -picture.shape[1] % 4), mode="replicate")


def picture_of(pixels, like):
    return (pixels[0, :, : like.shape[1], : like.shape[2]] + 1) / 2


def janus_vq(model, picture):
    ids = model.encode(pixels(picture)).image_tokens
    return ids.view(1, 4, 4), picture_of(model.decode(ids[None]), picture)


def emu3_vq(model, picture):
    x = pixels(picture)
    (ids,) = model.encode(x, image_sizes=torch.tensor([x.shape[2:]])).image_tokens
    return ids[None], picture_of(model.decode(ids[None]), picture)


def chameleon_vq(model, picture):
    x = pixels(picture)
    return model.encode(x).image_tokens.view(1, x.shape[2] // 4, x.shape[3] // 4), None


def diffusers_vq(model, picture):
    latents = model.encode(pixels(picture)).latents
    vectors, _, (_, _, ids) = model.quantize(latents)
    # With vectors instead of ids, as for a model that was saved without lookup_from_codebook.
    model.register_to_config(lookup_from_codebook=False)
    vectors = model.quantize.embedding(ids).view(1, *latents.shape[2:], -1).permute(0, 3, 1, 2).contiguous()
    back = model.decode(vectors, force_not_quantize=True).sample
    return ids.view(1, *latents.shape[2:]), picture_of(back, picture)


def vidtok(model, video):
    x = F.pad(video[None] * 2 - 1, (0, -video.shape[3] % 4, 0, -video.shape[2] % 4, 0, 0), mode="replicate")
    _, ids = model(x, encoder_mode=True)  # pads in time by itself, even lengths by a step more than they need
    ids = ids[:, : 1 - (1 - video.shape[1]) // model.temporal_compression_ratio]
    back = (model.decode(ids, decode_from_indices=True)[0] + 1) / 2
    torch.testing.assert_close(model(x).sample[0], (back * 2 - 1)[:, : video.shape[1]])
    return ids, back[:, : video.shape[1], : video.shape[2], : video.shape[3]]


CALLS = {
    "encodec": encodec,
    "dac": dac,
    "mimi": mimi,
    "janus-vq": janus_vq,
    "emu3-vq": emu3_vq,
    "chameleon-vq": chameleon_vq,
    "diffusers-vq": diffusers_vq,
    "vidtok": vidtok,
}


@pytest.mark.parametrize("name", CALLS)
def test_codes_and_media_are_those_of_the_model_alone(name):
    model, tokenizer, batch = theirs(name), adapter(name).wrap(theirs(name)), media(name)
    tolerance = 0.0
    if isinstance(tokenizer, QuickQuantizer):
        tokenizer.precision, tolerance = Precision(decode="float32"), 2e-4  # measured: 1e-6, DAC 1e-5 to 6e-5
    codes = tokenizer.encode(batch)
    assert len(codes.ids.unique()) > 7
    low, high = tokenizer.spec.value_range
    for i, medium in enumerate(batch):
        with torch.no_grad():
            ids, back = CALLS[name](model, medium)
        assert torch.equal(codes.item(i), ids)
        if back is not None:
            torch.testing.assert_close(tokenizer.decode(codes)[i], back.clamp(low, high), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_latents_and_pictures_are_those_of_the_model_alone(name):
    model, tokenizer, batch = theirs(name), adapter(name).wrap(theirs(name)), media(name)
    latents = tokenizer.encode(batch)
    back = tokenizer.decode(latents)
    for i, picture in enumerate(batch):
        with torch.no_grad():
            encoded = model.encode(pixels(picture))
            plane = encoded.latent_dist.mode() if name == "autoencoder-kl" else encoded.latent
            # In plain memory order, as ours: AutoencoderDC leaves another, in which convolutions round otherwise.
            decoded = model.decode(plane.contiguous()).sample
        assert torch.equal(latents.values[i, : latents.lengths[i]], plane[0].flatten(1).T)
        assert torch.equal(back[i], picture_of(decoded, picture).clamp(0, 1))
