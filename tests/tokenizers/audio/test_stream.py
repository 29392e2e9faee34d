import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtp.nn.conv1d import reach
from mmtp.tokenizers.audio import stream
from mmtp.tokenizers.audio.codec import AudioCodesError, AudioShapeError, AudioValueError
from mmtp.tokenizers.audio.stream import DecoderStream, EncoderStream, StreamError, WindowDecoderStream, decoder_stream
from mmtp.types import Codes

HOP = 8
chunkings = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encoded(tokenizer, sound, sizes):
    """Codes of a stream whose chunks are of these sizes, over and over."""
    encoder, parts, first = EncoderStream(tokenizer), [], 0
    while first < sound.shape[1]:
        for size in sizes:
            parts.append(encoder.push(sound[:, first : first + size]))
            first += size
    parts.append(encoder.flush())
    assert encoder.samples == sound.shape[1]
    return torch.cat(parts, 1)


def decoded(tokenizer, ids, sizes, samples):
    """The sound of a stream whose chunks are of these numbers of frames, over and over, the last one at the end."""
    decoder, parts, first = DecoderStream(tokenizer), [], 0
    while first < ids.shape[1] - 1:
        for size in sizes:
            parts.append(decoder.push(ids[:, first : min(first + size, ids.shape[1] - 1)]))
            first += size
    parts.append(decoder.flush(ids[:, -1:], samples=samples))
    assert decoder.samples == samples
    return torch.cat(parts, 1)


@chunkings
@given(samples=st.integers(1, 400), sizes=st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any))
def test_codes_of_a_stream_are_those_of_the_whole(causal, samples, sizes):
    sound = torch.rand(1, samples) * 2 - 1
    assert torch.equal(encoded(causal, sound, sizes), causal.encode([sound]).ids[0])


@chunkings
@given(samples=st.integers(1, 400), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
def test_samples_of_a_stream_are_those_of_the_whole(causal, samples, sizes):
    frames = causal.grid((samples,))[0]
    ids = torch.randint(0, 125, (causal.spec.num_codebooks, frames))
    (whole,) = causal.decode(Codes(ids[None], torch.tensor([[frames]]), torch.tensor([[samples]])))
    sound = decoded(causal, ids, sizes, samples)
    assert sound.shape == whole.shape == (1, samples)
    # Not the same bits: kernels add in another order where a chunk is shorter. 1.7e-6 is the worst seen in 60 chunkings each.
    assert (sound - whole).abs().max() < 1e-5


def test_the_state_matters(causal, sounds):
    """The tests above can fail: chunks by themselves give other codes and another sound."""
    (sound,) = sounds(400)
    codes = causal.encode([sound])
    apart = torch.cat([causal.encode([part]).ids[0] for part in sound.split(40, 1)], 1)
    assert not torch.equal(apart, codes.ids[0])
    (whole,) = causal.decode(codes)
    parts = [causal.decode(Codes(ids, torch.tensor([[5]])))[0] for ids in codes.ids.split(5, 2)]
    assert (torch.cat(parts, 1) - whole).abs().max() > 1e-2


def test_frames_come_as_soon_as_they_are_complete(causal):
    encoder = EncoderStream(causal)
    counts = [encoder.push(torch.zeros(1, n)).shape[1] for n in (7, 1, 0, 20, 3, 1)]
    assert counts == [0, 1, 0, 2, 0, 1]
    assert encoder.flush().shape == (causal.spec.num_codebooks, 0)


def test_sound_comes_its_delay_after_the_codes(causal):
    decoder = DecoderStream(causal)
    ids = torch.zeros(causal.spec.num_codebooks, 1, dtype=torch.long)
    assert decoder.delay == (0 if "Conv" in type(causal).__name__ else 3)
    counts = [decoder.push(ids).shape[1] for _ in range(5)]
    assert counts == [0] * decoder.delay + [HOP] * (5 - decoder.delay)
    assert decoder.flush().shape == (1, decoder.delay * HOP)
    assert decoder.samples == 5 * HOP


def test_streams_of_nothing_and_of_one_sample(causal):
    encoder, decoder = EncoderStream(causal), DecoderStream(causal)
    assert encoder.flush().shape == (causal.spec.num_codebooks, 0)
    assert decoder.flush(samples=0).shape == (1, 0)
    encoder, decoder = EncoderStream(causal), DecoderStream(causal)
    assert encoder.push(torch.ones(1, 1)).shape[1] == 0
    assert decoder.flush(encoder.flush(), samples=encoder.samples).shape == (1, 1)


def test_streams_run_side_by_side(causal, sounds):
    first, second = sounds(96, 97)
    expected = [causal.encode([first]).ids[0], causal.encode([second[:, :96]]).ids[0]]
    streams = EncoderStream(causal), EncoderStream(causal)
    parts = [[], []]
    for at in range(0, 96, 24):
        for i, sound in enumerate((first, second)):
            parts[i].append(streams[i].push(sound[:, at : at + 24]))
    assert all(torch.equal(torch.cat(parts[i], 1), expected[i]) for i in (0, 1))


def test_a_large_chunk_passes_in_parts(causal, sounds, monkeypatch):
    codes = causal.encode(sounds(800))
    (whole,) = causal.decode(codes)
    seen = []
    hook = causal.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    monkeypatch.setattr(stream, "SAMPLES_PER_PASS", 240)
    assert torch.equal(encoded(causal, sounds(800)[0], [800]), codes.ids[0])
    hook.remove()
    assert seen == [240, 240, 240, 80]
    assert (decoded(causal, codes.ids[0], [100], 800) - whole).abs().max() < 1e-5


def test_memory_does_not_grow_with_the_stream(causal, sounds):
    encoder, decoder = EncoderStream(causal), DecoderStream(causal)

    def held() -> int:
        tensors = [*encoder._state.values(), *decoder._state.values(), encoder._rest]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    sizes = set()
    for chunk in sounds(3000)[0].split(100, 1):
        decoder.push(encoder.push(chunk))
        sizes.add(held() - encoder._rest.untyped_storage().nbytes())
    assert len(sizes) == 1


def test_fewer_codebooks_stream_too(causal, sounds):
    codes = causal.encode(sounds(160))
    coarse = Codes(codes.ids[:, :1], codes.lengths, codes.sizes)
    assert (decoded(causal, coarse.ids[0], [3], 160) - causal.decode(coarse)[0]).abs().max() < 1e-5


def test_a_bad_chunk_leaves_the_stream_as_it_was(causal, sounds):
    (sound,) = sounds(160)
    encoder = EncoderStream(causal)
    parts = [encoder.push(sound[:, :81])]
    with pytest.raises(AudioShapeError, match=r"chunk at sample 81: torch.float32 \[2, 5\] given"):
        encoder.push(torch.zeros(2, 5))
    with pytest.raises(AudioValueError, match="chunk at sample 81: sample 1 is nan"):
        encoder.push(torch.tensor([[0, float("nan")]]))
    parts += [encoder.push(sound[:, 81:]), encoder.flush()]
    assert torch.equal(torch.cat(parts, 1), causal.encode([sound]).ids[0])
    decoder = DecoderStream(causal)
    with pytest.raises(AudioCodesError, match="codes of 9 codebooks given"):
        decoder.push(torch.zeros(9, 2, dtype=torch.long))
    assert decoder.flush().shape == (1, 0)


def test_what_has_ended_stays_ended(causal):
    encoder, decoder = EncoderStream(causal), DecoderStream(causal)
    encoder.flush(), decoder.flush()
    ids = torch.zeros(1, 1, dtype=torch.long)
    for again in (encoder.flush, decoder.flush, lambda: encoder.push(torch.zeros(1, 1)), lambda: decoder.push(ids)):
        with pytest.raises(StreamError, match="this stream has ended; make a new one"):
            again()


def test_a_length_that_cannot_be_is_refused(causal):
    ids = torch.zeros(causal.spec.num_codebooks, 10, dtype=torch.long)
    decoder = DecoderStream(causal)
    decoder.push(ids)
    for samples in (81, (10 - decoder.delay) * HOP - 1):
        with pytest.raises(StreamError, match=rf"a stream of {samples} samples cannot end here: \d+ were given, its codes are of 80"):
            decoder.flush(samples=samples)
    assert decoder.flush(samples=80).shape[1] == decoder.delay * HOP


@pytest.mark.parametrize("stream_class", [EncoderStream, DecoderStream])
def test_what_is_not_causal_is_refused(tokenizer, stream_class):
    if tokenizer.config.causal:
        stream_class(tokenizer)
    else:
        with pytest.raises(StreamError, match="this tokenizer is not causal"):
            stream_class(tokenizer)


@chunkings
@given(frames=st.integers(1, 150), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), small=st.booleans())
def test_sound_of_a_tokenizer_that_sees_ahead_comes_in_chunks_too(tokenizer, frames, sizes, small):
    ids = torch.randint(0, 125, (tokenizer.spec.num_codebooks, frames))
    (whole,) = tokenizer.decode(Codes(ids[None], torch.tensor([[frames]])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SAMPLES_PER_PASS", 5 * HOP if small else 10**6)
        decoder, parts, first = decoder_stream(tokenizer), [], 0
        while first < frames:
            for size in sizes:
                parts.append(decoder.push(ids[:, first : first + size]))
                first += size
        parts.append(decoder.flush(ids[:, :0]))
    sound = torch.cat(parts, 1)
    assert sound.shape == whole.shape and decoder.samples == whole.shape[1]
    assert (sound - whole).abs().max() < 1e-5


def test_a_chunk_waits_for_what_it_hangs_on_and_at_most_doubles_the_work(tokenizer):
    decoder = decoder_stream(tokenizer)
    if not isinstance(decoder, WindowDecoderStream):
        return
    around = sum(reach(tokenizer.decoder))
    ids = torch.randint(0, 125, (tokenizer.spec.num_codebooks, 100))
    given = [decoder.push(ids[:, i : i + 1]).shape[1] // HOP for i in range(100)]
    assert given.index(around) == around + decoder.delay - 1 and set(given) == {0, around}
    with pytest.raises(AudioCodesError):
        decoder.push(ids + 1000)
    assert sum(given) * HOP + decoder.flush(ids[:, :0]).shape[1] == 100 * HOP
    with pytest.raises(StreamError, match="has ended"):
        decoder.push(ids)
