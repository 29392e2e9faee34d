"""What holds for every audio tokenizer, whatever its network."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtp.nn.conv1d import reach
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.audio import codec
from mmtp.tokenizers.audio.codec import AudioCodesError, AudioShapeError, AudioValueError
from mmtp.types import Codes, Modality

HOP = 8
anything = settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_conforms(tokenizer, sounds):
    check_tokenizer(tokenizer, sounds(100, 64, 64, 1, 333))


def test_codes_tell_sounds_apart(tokenizer, sounds):
    """Else most tests of this file would hold of a constant."""
    codes = tokenizer.encode(sounds(800)).ids
    assert all(len(codes[0, k].unique()) > 10 for k in range(codes.shape[1]))


@anything
@given(samples=st.integers(1, 300))
def test_any_length_comes_back_at_its_length(tokenizer, samples):
    sound = torch.rand(1, samples) * 2 - 1
    codes = tokenizer.encode([sound])
    assert tuple(codes.lengths[0].tolist()) == tokenizer.grid((samples,)) == (math.ceil(samples / HOP),)
    assert codes.sizes.tolist() == [[samples]]
    assert codes.ids[0].numel() == tokenizer.num_tokens((samples,))
    (back,) = tokenizer.decode(codes)
    assert back.shape == sound.shape
    assert -1 <= back.min() <= back.max() <= 1


@anything
@given(samples=st.integers(1, 700), frames_per_pass=st.integers(8, 60))
def test_windows_give_what_the_whole_gives(tokenizer, samples, frames_per_pass):
    (sound,) = torch.rand(1, 1, samples) * 2 - 1
    codes = tokenizer.encode([sound])
    (whole,) = tokenizer.decode(codes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "SAMPLES_PER_PASS", frames_per_pass * HOP)
        assert torch.equal(tokenizer.encode([sound]).ids, codes.ids)
        (windowed,) = tokenizer.decode(codes)
    # Kernels of another shape add in another order; 8e-7 is the worst seen.
    assert (windowed - whole).abs().max() < 1e-5


def test_windows_must_see_their_neighbourhood(tokenizer, sounds, monkeypatch):
    """The test above can fail: without the frames around a window, codes and sounds change at its edges."""
    codes = tokenizer.encode(sounds(800))
    (whole,) = tokenizer.decode(codes)
    monkeypatch.setattr(codec, "SAMPLES_PER_PASS", 10 * HOP)
    monkeypatch.setattr(codec, "reach", lambda *_: (0, 0))
    assert not torch.equal(tokenizer.encode(sounds(800)).ids, codes.ids)
    assert (tokenizer.decode(codes)[0] - whole).abs().max() > 1e-3


def test_windows_are_of_bounded_length(tokenizer, sounds, monkeypatch):
    seen = []
    hooks = [net.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape)) for net in (tokenizer.encoder, tokenizer.decoder)]
    monkeypatch.setattr(codec, "SAMPLES_PER_PASS", 40 * HOP)
    tokenizer.decode(tokenizer.encode(sounds(2000, 40)))
    for hook in hooks:
        hook.remove()
    around = max(sum(reach(tokenizer.encoder, HOP)), sum(reach(tokenizer.decoder)))
    assert len(seen) == 2 * (7 + 1)
    assert all(batch == 1 and (steps // HOP if channels == 1 else steps) <= 40 + around for batch, channels, steps in seen)


def test_reach_is_what_a_frame_sees(tokenizer):
    """Not less, or windows would be wrong; for the encoder not more than a frame more, or they would be slow."""
    before, after = reach(tokenizer.encoder, HOP)
    frames = before + after + 8
    middle = before + 4
    sound = (torch.rand(1, 1, frames * HOP) * 2 - 1).requires_grad_()
    tokenizer.encoder(sound)[0, :, middle].square().sum().backward()
    touched = (sound.grad[0, 0] != 0).nonzero()[:, 0] // HOP
    assert touched.min() == middle - before
    assert touched.max() == middle + after
    before, after = reach(tokenizer.decoder)
    frames, middle = before + after + 8, before + 4
    latents = torch.randn(1, tokenizer.dim, frames, requires_grad=True)
    tokenizer.decoder(latents)[..., middle * HOP : (middle + 1) * HOP].square().sum().backward()
    touched = (latents.grad[0] != 0).any(0).nonzero()[:, 0]
    assert middle - before <= touched.min() <= middle - before + 2
    assert middle + after - 2 <= touched.max() <= middle + after


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_codes_are_those_of_the_sound_alone_in_any_batch(tokenizer, sounds, batch):
    media = sounds(*(200 + i % 9 for i in range(batch)))
    together = tokenizer.encode(media)
    back = tokenizer.decode(together)
    for i in range(0, batch, 15):
        alone = tokenizer.encode([media[i]])
        assert torch.equal(together.item(i), alone.item(0))
        assert torch.equal(back[i], tokenizer.decode(alone)[0])


def test_a_causal_code_depends_on_nothing_after_its_frame(causal, sounds):
    sound = sounds(400)[0]
    codes = causal.encode([sound]).ids
    for frame in (1, 20, 40):
        changed = sound.clone()
        changed[:, frame * HOP :] = -changed[:, frame * HOP :]
        other = causal.encode([changed]).ids
        assert torch.equal(other[..., :frame], codes[..., :frame])
        assert not torch.equal(other[..., frame:], codes[..., frame:])


def test_a_causal_sample_depends_on_no_code_after_its_delay(causal, sounds):
    codes = causal.encode(sounds(400))
    (sound,) = causal.decode(codes)
    delay = reach(causal.decoder)[1]
    changed = codes.ids.clone()
    changed[..., 20:] = (changed[..., 20:] + 7) % 125
    (other,) = causal.decode(Codes(changed, codes.lengths, codes.sizes))
    assert torch.equal(other[:, : (20 - delay) * HOP], sound[:, : (20 - delay) * HOP])
    assert not torch.equal(other[:, (20 - delay) * HOP : 21 * HOP], sound[:, (20 - delay) * HOP : 21 * HOP])


def test_training_sees_what_decoding_gives(tokenizer, sounds):
    (sound,) = sounds(400)
    output, quantized = tokenizer(sound[None])
    codes = tokenizer.encode([sound])
    assert output.shape == (1, 1, 400)
    assert torch.equal(quantized.ids[0].T, codes.ids[0])
    assert (output[0].clamp(-1, 1) - tokenizer.decode(codes)[0]).abs().max() < 1e-5
    output.square().mean().backward()
    # Wherever a gradient can be, also before the quantizer.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    assert next(tokenizer.encoder.parameters()).grad.abs().max() > 0
    tokenizer.zero_grad()


def test_training_runs_under_autocast(tokenizer):
    with torch.autocast("cpu", torch.bfloat16):
        output, quantized = tokenizer(torch.rand(2, 1, 160) * 2 - 1)
        assert output.dtype == quantized.latents.dtype == torch.float32
        output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    tokenizer.zero_grad()


def test_training_wants_whole_frames(tokenizer):
    with pytest.raises(AudioShapeError, match="401 samples given, a multiple of 8 wanted"):
        tokenizer(torch.zeros(1, 1, 401))


def test_fewer_codebooks_are_a_lower_bit_rate(tokenizer, sounds):
    codes = tokenizer.encode(sounds(400))
    (full,) = tokenizer.decode(codes)
    for k in range(1, tokenizer.spec.num_codebooks):
        (coarse,) = tokenizer.decode(Codes(codes.ids[:, :k], codes.lengths, codes.sizes))
        assert coarse.shape == full.shape
        assert not torch.equal(coarse, full)


def test_mode_and_autocast_do_not_change_codes(tokenizer, sounds):
    expected = tokenizer.encode(sounds(300))
    (sound,) = tokenizer.decode(expected)
    tokenizer.train()
    with torch.autocast("cpu", torch.bfloat16):
        codes = tokenizer.encode(sounds(300))
        (again,) = tokenizer.decode(codes)
    assert tokenizer.training
    tokenizer.eval()
    assert torch.equal(codes.ids, expected.ids)
    assert torch.equal(again, sound)
    assert not again.requires_grad


def test_spec(tokenizer):
    spec = tokenizer.spec
    assert (spec.modality, spec.downsampling, spec.channels, spec.value_range) == (Modality.AUDIO, (8,), 1, (-1.0, 1.0))
    assert (spec.sample_rate, tokenizer.frame_rate) == (16000, 2000)
    assert dataclasses.replace(tokenizer.config, sample_rate=24000).build().spec.sample_rate == 24000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_other_types_are_taken_as_float32(tokenizer, sounds, dtype):
    sound = sounds(100)[0].to(dtype)
    assert torch.equal(tokenizer.encode([sound]).ids, tokenizer.encode([sound.float()]).ids)


def test_silence_and_single_samples_are_sounds(tokenizer):
    sounds = [torch.zeros(1, 500), torch.full((1, 1), 0.5), torch.full((1, 16), 1e-30)]
    back = tokenizer.decode(tokenizer.encode(sounds))
    assert [b.shape for b in back] == [s.shape for s in sounds]
    assert all(b.isfinite().all() for b in back)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 80), r"sound 1: torch.float32 \[2, 80\] given, floats \[1, samples\] wanted; mix channels down first"),
        (torch.zeros(80), r"sound 1: torch.float32 \[80\] given, floats \[1, samples\] wanted$"),
        (torch.zeros(1, 1, 80), r"\[1, 1, 80\] given"),
        (torch.zeros(1, 80, dtype=torch.int16), r"torch.int16 \[1, 80\] given, floats"),
        (torch.zeros(1, 0), "sound 1: has no samples"),
    ],
)
def test_sounds_of_another_shape_are_refused(tokenizer, sounds, bad, message):
    with pytest.raises(AudioShapeError, match=message):
        tokenizer.encode([*sounds(80), bad])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 32767.0, -32768.0])
def test_samples_that_are_not_of_the_scale_are_refused(tokenizer, sounds, bad):
    broken = sounds(80)[0]
    broken[0, 33:] = bad
    with pytest.raises(AudioValueError, match=rf"sound 1: sample 33 is {bad:g}, numbers in \[-1, 1\] are wanted"):
        tokenizer.encode([*sounds(80), broken])


def test_overshoot_is_taken_as_it_is(tokenizer, sounds):
    loud = sounds(80)[0] * 1.5
    assert not torch.equal(tokenizer.encode([loud]).ids, tokenizer.encode([loud.clamp(-1, 1)]).ids)


def test_codes_of_another_tokenizer_are_refused(tokenizer):
    lengths = torch.tensor([[4]])
    most = tokenizer.spec.num_codebooks
    with pytest.raises(AudioCodesError, match=f"codes of {most + 1} codebooks given, 1 to {most} wanted"):
        tokenizer.decode(Codes(torch.zeros(1, most + 1, 4, dtype=torch.long), lengths))
    with pytest.raises(AudioCodesError, match="codes of 0 codebooks given"):
        tokenizer.decode(Codes(torch.zeros(1, 0, 4, dtype=torch.long), lengths))
    for wrong in (-1, 125):
        with pytest.raises(AudioCodesError, match=f"codes {wrong} to {wrong} of codebook 0 given, 0 to 124 wanted"):
            tokenizer.decode(Codes(torch.full((1, most, 4), wrong), lengths))


def test_decode_without_sizes_gives_whole_frames(tokenizer, sounds):
    codes = tokenizer.encode(sounds(21))
    (back,) = tokenizer.decode(Codes(codes.ids, codes.lengths))
    assert back.shape == (1, 24)


def test_empty_batch_and_empty_codes(tokenizer):
    codes = tokenizer.encode([])
    assert codes.ids.shape == (0, tokenizer.spec.num_codebooks, 0)
    assert tokenizer.decode(codes) == []
    none = Codes(torch.zeros(1, tokenizer.spec.num_codebooks, 0, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
    assert tokenizer.decode(none)[0].shape == (1, 0)


def test_codebook_vectors_are_one_per_code(tokenizer):
    for k in range(tokenizer.spec.num_codebooks):
        vectors = tokenizer.codebook_vectors(k)
        assert vectors.shape == (125, tokenizer.dim)
        assert len(vectors.unique(dim=0)) == 125
