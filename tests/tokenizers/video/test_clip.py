"""What holds for every video tokenizer, whatever its network."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtp.testing import check_tokenizer
from mmtp.tokenizers.video.clip import VideoCodesError, VideoShapeError, VideoValueError
from mmtp.types import Codes, Modality

anything = settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_conforms(anyone, noise):
    check_tokenizer(anyone, noise((5, 8, 8), (1, 1, 1), (7, 9, 5)))


def test_codes_tell_videos_apart(anyone, noise):
    """Else most tests of this file would hold of a constant."""
    codes = anyone.encode(noise(*[(9, 16, 16)] * 4)).ids
    assert len({tuple(item.flatten().tolist()) for item in codes}) == 4
    assert all(len(codes[:, k].unique()) > 5 for k in range(codes.shape[1]))


@anything
@given(frames=st.integers(1, 11), height=st.integers(1, 20), width=st.integers(1, 20))
def test_any_extent_comes_back_as_it_was(anyone, frames, height, width):
    video, step = torch.rand(3, frames, height, width), anyone.cell[0]
    codes = anyone.encode([video])
    grid = (1 + math.ceil((frames - 1) / step), math.ceil(height / 4), math.ceil(width / 4))
    assert tuple(codes.lengths[0].tolist()) == anyone.grid(video.shape[1:]) == grid
    assert codes.sizes.tolist() == [[frames, height, width]]
    assert codes.ids[0].numel() == anyone.num_tokens(video.shape[1:])
    (back,) = anyone.decode(codes)
    assert back.shape == video.shape
    assert 0 <= back.min() <= back.max() <= 1


@anything
@given(frames=st.integers(1, 11), height=st.integers(1, 12), width=st.integers(1, 12))
def test_padding_is_repeating_the_last_frame_and_the_border(anyone, frames, height, width):
    video = torch.rand(3, frames, height, width)
    whole = anyone.extent(anyone.grid(video.shape[1:]))
    t, rows, columns = (torch.arange(n).clamp(max=size - 1) for n, size in zip(whole, (frames, height, width), strict=True))
    assert torch.equal(anyone.encode([video]).ids, anyone.encode([video[:, t][:, :, rows][:, :, :, columns]]).ids)


def test_a_picture_is_the_first_code_frame_of_every_video_that_begins_with_it(anyone, noise):
    (picture,) = noise((1, 13, 18))
    alone = anyone.encode([picture])
    for length in (1, 4, 9):
        (rest,) = noise((length, 13, 18))
        codes = anyone.encode([torch.cat([picture, rest], 1)])
        assert torch.equal(codes.ids[:, :, :1], alone.ids)
        assert torch.equal(anyone.decode(codes)[0][:, :1], anyone.decode(alone)[0])


def test_codes_depend_on_the_past_and_not_on_the_future(f4t4, noise):
    (video,) = noise((13, 8, 8))
    changed = video.clone()
    changed[:, 5:9] = 1 - changed[:, 5:9]
    before, after = f4t4.encode([video]).ids, f4t4.encode([changed]).ids
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])


def test_no_pass_is_longer_than_a_code_frame(f4t4, noise):
    seen = []
    hooks = [net.register_forward_pre_hook(lambda net, args: seen.append(args[0].shape[2])) for net in (f4t4.encoder, f4t4.decoder)]
    f4t4.decode(f4t4.encode(noise((14, 8, 8))))
    for hook in hooks:
        hook.remove()
    assert seen == [1, 4, 4, 4, 4, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_codes_are_those_of_the_video_alone_in_any_batch(f4t4, noise, batch):
    media = noise(*[(2, 8, 12)] * batch)
    together = f4t4.encode(media)
    for i in range(0, batch, 7):
        assert torch.equal(together.item(i), f4t4.encode([media[i]]).item(0))


def test_spec(anyone):
    spec = anyone.spec
    assert (spec.modality, spec.channels, spec.value_range, spec.sample_rate) == (Modality.VIDEO, 3, (0.0, 1.0), None)
    assert spec.downsampling == anyone.cell and spec.downsampling[1:] == (4, 4)


def test_training_gives_what_decoding_gives(anyone, noise):
    """Forward pass of training and encode-decode are one function up to the range, and to rounding."""
    (video,) = noise((9, 8, 12))
    with torch.no_grad():
        output, quantized = anyone(video[None] * 2 - 1)
    codes = anyone.encode([video])
    assert torch.equal(quantized.ids[0].T.reshape(codes.ids[0].shape), codes.ids[0])
    torch.testing.assert_close(output[0].add(1).div(2).clamp(0, 1), anyone.decode(codes)[0])


def test_training_reaches_every_weight(anyone, noise):
    anyone.train()
    pixels = torch.stack(noise(*[(9, 8, 8)] * 2)) * 2 - 1
    output, quantized = anyone(pixels)
    ((output - pixels).square().mean() + quantized.loss).backward()
    anyone.eval()
    for name, parameter in anyone.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    anyone.zero_grad(set_to_none=True)


def test_training_takes_whole_cells_only(f4t4):
    with pytest.raises(VideoShapeError, match=r"videos of 6x8x9 \(frames, height, width\) given, whole cells are wanted: 9x8x12"):
        f4t4(torch.rand(1, 3, 6, 8, 9))


def test_mode_and_autocast_do_not_change_codes(anyone, noise):
    batch = noise((5, 8, 12))
    expected = anyone.encode(batch).ids
    anyone.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(anyone.encode(batch).ids, expected)
    assert anyone.training
    anyone.eval()


@pytest.mark.parametrize(
    "bad", [torch.rand(1, 2, 8, 8), torch.rand(8, 8), torch.rand(3, 2, 0, 8), torch.zeros(3, 2, 8, 8, dtype=torch.uint8)]
)
def test_videos_of_another_shape_are_refused(f4t4, noise, bad):
    with pytest.raises(VideoShapeError, match=r"^video 1: .* \[3, frames, height, width\] wanted$"):
        f4t4.encode([*noise((2, 8, 8)), bad])


def test_pictures_and_videos_without_frames_are_refused(f4t4, noise):
    with pytest.raises(VideoShapeError, match=r"a picture is a video of one frame: picture\[:, None\]$"):
        f4t4.encode([torch.rand(3, 8, 8)])
    with pytest.raises(VideoShapeError, match="^video 1: has no frames$"):
        f4t4.encode([*noise((2, 8, 8)), torch.zeros(3, 0, 8, 8)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 255.0])
def test_values_that_cannot_be_are_refused(f4t4, noise, bad):
    good, other = noise((2, 8, 8), (3, 8, 8))
    other[2, 1, 3, 5] = bad
    where = "channel 2 of frame 1, row 3, column 5"
    with pytest.raises(VideoValueError, match=rf"^video 1: {where} is {bad:g}, numbers in \[0, 1\] are wanted$"):
        f4t4.encode([good, other])


def test_codes_of_another_tokenizer_are_refused(anyone, noise):
    codes = anyone.encode(noise((5, 8, 8)))
    high = codes.ids.clone()
    high[0, 0, 1, 0, -1] = 125
    for ids, words in (
        (high, "to 125 of codebook 0 given, 0 to 124 wanted"),
        (codes.ids - 200, "codes -"),
        (codes.ids[:, :0], "codes of 0 c"),
    ):
        with pytest.raises(VideoCodesError, match=words):
            anyone.decode(dataclasses.replace(codes, ids=ids))


def test_empty_batch(anyone):
    codes = anyone.encode([])
    assert codes.ids.shape == (0, len(anyone.spec.codebook_sizes), 0, 0, 0)
    assert anyone.decode(codes) == []


def test_without_sizes_whole_cells_come_back(f4t4, noise):
    codes = f4t4.encode(noise((3, 10, 7)))
    assert f4t4.decode(Codes(codes.ids, codes.lengths))[0].shape == (3, 5, 12, 8)
