import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtp.tokenizers.base import StreamError
from mmtp.tokenizers.video.clip import VideoCodesError, VideoShapeError, VideoValueError
from mmtp.tokenizers.video.stream import DecoderStream, EncoderStream


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 6), min_size=1, max_size=6), height=st.integers(1, 9))
def test_chunks_of_any_length_are_the_whole_to_the_bit(anyone, cuts, height):
    video = torch.rand(3, sum(cuts) + 1, height, 7)
    encoder, decoder = EncoderStream(anyone), DecoderStream(anyone, size=(height, 7))
    codes, frames = [], []
    for chunk in video.split([1, *cuts], 1):
        codes.append(encoder.push(chunk))
        frames.append(decoder.push(codes[-1]))
    codes.append(encoder.flush())
    frames.append(decoder.flush(codes[-1], frames=encoder.frames))
    offline = anyone.encode([video])
    assert encoder.frames == decoder.frames == video.shape[1]
    assert torch.equal(torch.cat(codes, 1), offline.item(0))
    assert torch.equal(torch.cat(frames, 1), anyone.decode(offline)[0])


def test_codes_come_as_soon_as_their_frames_are_there(f4t4, noise):
    (video,) = noise((10, 8, 8))
    encoder = EncoderStream(f4t4)
    assert [encoder.push(frame).shape[1] for frame in video.split(1, 1)] == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert encoder.flush().shape == (1, 1, 2, 2)


def test_codes_in_other_chunks_give_the_same_frames(f4t4, noise):
    codes = f4t4.encode(noise((14, 8, 8)))
    decoder = DecoderStream(f4t4)
    frames = [decoder.push(codes.item(0)[:, :3]), decoder.push(codes.item(0)[:, 3:3]), decoder.flush(codes.item(0)[:, 3:], 14)]
    assert [f.shape[1] for f in frames] == [9, 0, 5]
    assert torch.equal(torch.cat(frames, 1), f4t4.decode(codes)[0])


def test_state_does_not_grow(f4t4, noise):
    encoder, sizes = EncoderStream(f4t4), set()
    for chunk in noise(*[(4, 8, 8)] * 6):
        encoder.push(chunk)
        sizes.add(sum(t.untyped_storage().nbytes() for t in encoder._state.values()))
    assert len(sizes) == 1


def test_chunks_that_cannot_be_are_refused_and_not_taken(f4t4, noise):
    (video,) = noise((9, 8, 8))
    encoder = EncoderStream(f4t4)
    with pytest.raises(StreamError, match="nothing was pushed"):
        encoder.flush()
    codes = [encoder.push(video[:, :4])]
    with pytest.raises(VideoShapeError, match="chunk at frame 4: frames of 8x9 pixels given, those before have 8x8"):
        encoder.push(torch.rand(3, 2, 8, 9))
    with pytest.raises(VideoValueError, match="chunk at frame 4: channel 0 of frame 1"):
        encoder.push(torch.tensor([0.0, torch.nan]).view(1, 2, 1, 1).expand(3, 2, 8, 8))
    codes += [encoder.push(video[:, 4:]), encoder.flush()]
    assert torch.equal(torch.cat(codes, 1), f4t4.encode([video]).item(0))
    with pytest.raises(StreamError, match="has ended"):
        encoder.push(video)


def test_a_decoder_stream_ends_where_it_can(f4t4, noise):
    codes = f4t4.encode(noise((9, 8, 8))).item(0)
    decoder = DecoderStream(f4t4)
    with pytest.raises(StreamError, match="a stream of 10 frames cannot end here: 0 were given, its codes are of 9"):
        decoder.flush(codes, 10)
    decoder.push(codes[:, :2])
    for frames in (4, 10):
        with pytest.raises(StreamError, match=rf"a stream of {frames} frames cannot end here: 5 were given, its codes are of 9"):
            decoder.flush(codes[:, 2:], frames)
    with pytest.raises(VideoCodesError):
        decoder.push(codes[:, 2:] + 125)
    assert decoder.flush(codes[:, 2:], 6).shape == (3, 1, 8, 8)
    with pytest.raises(StreamError, match="has ended"):
        decoder.push(codes)
