import io
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mmtp.data.errors import DataError, DecodeError, Reason
from mmtp.data.media import encode_png, to_uint8
from mmtp.data.video import decode_video, encode_video

av = pytest.importorskip("av")

FRAMES = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 3, 4, generator=torch.Generator().manual_seed(0)), (9, 24, 32))[0]


def film(frames=FRAMES, codec="libx264", pixels="yuv420p", container="mp4", rate=8, options=None) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = pixels
        for t in range(frames.shape[1]):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(to_uint8(frames[:, t]), format="rgb24")))
        file.mux(stream.encode(None))
    return out.getvalue()


def animation(kind: str, frames: list[Image.Image], **options) -> bytes:
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], **options)
    return out.getvalue()


def colours(*names: str, mode: str = "RGB") -> list[Image.Image]:
    return [Image.new(mode, (6, 4), name) for name in names]


def refusal(data: bytes, **options) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode_video(data, **options)
    return caught.value


@pytest.mark.parametrize(
    ("codec", "pixels", "container"),
    [("libx264", "yuv420p", "mp4"), ("libvpx-vp9", "yuv420p", "webm"), ("mpeg4", "yuv420p", "avi"), ("libx264", "yuv444p", "matroska")],
)
def test_films_of_every_kind(codec, pixels, container):
    video = decode_video(film(codec=codec, pixels=pixels, container=container))
    assert (video.frames.shape, video.frames.dtype) == (FRAMES.shape, torch.float32)
    assert (video.frames - FRAMES).abs().mean() < 0.06
    torch.testing.assert_close(video.times, torch.arange(9) / 8, rtol=0, atol=2e-3)  # webm counts in milliseconds
    assert video.frame_rate == pytest.approx(8, rel=1e-3)


def test_a_lossless_film_gives_back_every_pixel():
    data = film(codec="libx264rgb", pixels="rgb24", options={"qp": "0"})
    np.testing.assert_array_equal(to_uint8(decode_video(data).frames[:, 4]), to_uint8(FRAMES[:, 4]))


@pytest.mark.parametrize("size", [(24, 32), (23, 31)])
def test_written_films_are_read_back(size):
    frames = FRAMES[:, :, : size[0], : size[1]]
    video = decode_video(encode_video(frames, 12.5))
    assert (video.frames.shape, video.frame_rate) == (frames.shape, 12.5)
    assert (video.frames - frames).abs().mean() < 0.04


def test_written_gifs_are_read_back():
    video = decode_video(encode_video(FRAMES, 20, "gif"))
    assert (video.frames.shape, video.frame_rate) == (FRAMES.shape, pytest.approx(20))
    assert (video.frames - FRAMES).abs().max() < 0.01  # twelve colours a frame


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations(kind):
    video = decode_video(animation(kind, colours("red", "lime", "blue"), duration=[100, 300, 200]))
    means = video.frames.mean((2, 3))
    np.testing.assert_allclose(means.numpy(), np.eye(3), atol=0.02)
    torch.testing.assert_close(video.times, torch.tensor([0.0, 0.1, 0.4]))
    assert video.frame_rate == pytest.approx(5)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_transparency_lies_on_white(kind):
    clear, red = Image.new("RGBA", (6, 4), (0, 0, 255, 0)), Image.new("RGBA", (6, 4), "red")
    video = decode_video(animation(kind, [clear, red], duration=100, lossless=True))
    np.testing.assert_allclose(video.frames.mean((2, 3)).T.numpy(), [[1, 1, 1], [1, 0, 0]], atol=0.02)


def test_frames_are_left_out_and_shown_again():
    data = animation("GIF", colours("red", "lime", "blue"), duration=[100, 300, 200])
    video = decode_video(data, frame_rate=10)
    assert video.frames.mean((2, 3)).argmax(0).tolist() == [0, 1, 1, 1, 2, 2]
    assert (video.frame_rate, video.times.tolist()) == (10, pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5]))
    assert decode_video(data, frame_rate=5).frames.mean((2, 3)).argmax(0).tolist() == [0, 1, 2]
    assert decode_video(film(), frame_rate=4).frames.shape[1] == 5


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_a_video_of_one_frame(kind):
    out = io.BytesIO()
    Image.open(io.BytesIO(encode_png(FRAMES[:, 0]))).save(out, kind)
    video = decode_video(out.getvalue())
    assert (video.frames.shape, video.times.tolist()) == ((3, 1, 24, 32), [0.0])


def test_frames_are_brought_to_a_size():
    assert decode_video(film(), size=(8, 8)).frames.shape == (3, 9, 8, 8)
    assert decode_video(animation("GIF", colours("red", "blue")), size=(4, 4)).frames.shape == (3, 2, 4, 4)


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotation_is_applied(matrix, turns):
    data = film()
    at = data.index(b"tkhd") + 4 + 40  # version, flags, times, track, layer, volume
    a, b, c, d = (n << 16 for n in matrix)
    turned = data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]
    plain = decode_video(data).frames
    torch.testing.assert_close(decode_video(turned).frames, plain.rot90(turns, (2, 3)))


def test_sizes_have_limits():
    assert refusal(film(), max_pixels=767).reason is Reason.TOO_LARGE
    error = refusal(film(), max_video_pixels=9 * 768 - 1)
    assert error.reason is Reason.TOO_LARGE and "give it a size or a lower frame rate" in str(error)
    assert decode_video(film(), max_video_pixels=5 * 768, frame_rate=4).frames.shape[1] == 5
    assert refusal(animation("GIF", colours("red", "blue")), max_pixels=23).reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", Reason.EMPTY), (b"hello, I am no video at all", Reason.NOT_MEDIA), (film()[:900], Reason.CORRUPT)],
    ids=["zero-byte", "words", "cut-mp4"],
)
def test_what_is_no_video(data, reason):
    assert refusal(data).reason is reason


def test_cut_films_are_refused():
    webm = film(codec="libvpx-vp9", container="webm")
    assert refusal(webm[:-100]).reason is Reason.TRUNCATED
    head = film(options={"x264-params": "keyint=1"})
    moov = head.index(b"moov") - 4
    # The table first and the frames after it, as streaming wants it; offsets into the file move by the table's length.
    table, rest, shift = bytearray(head[moov:]), head[:moov], len(head) - moov
    at = table.index(b"stco") + 8
    for i in range(struct.unpack_from(">I", table, at)[0]):
        place = at + 4 + 4 * i
        struct.pack_into(">I", table, place, struct.unpack_from(">I", table, place)[0] + shift)
    ftyp = struct.unpack(">I", rest[:4])[0]
    streamed = rest[:ftyp] + bytes(table) + rest[ftyp:]
    assert decode_video(streamed).frames.shape == FRAMES.shape
    assert refusal(streamed[: -len(rest) // 2]).reason in (Reason.TRUNCATED, Reason.CORRUPT)


def test_cut_animations_are_refused():
    data = encode_video(FRAMES, 10, "gif")
    assert refusal(data[: len(data) // 2]).reason in (Reason.TRUNCATED, Reason.CORRUPT)


def test_sound_without_a_picture_is_no_video(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "tone.wav", np.zeros(1000), 8000)
    assert refusal((tmp_path / "tone.wav").read_bytes()).reason is Reason.NOT_MEDIA


def test_a_missing_library_names_the_extra(monkeypatch):
    data = film()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"reading video files needs an extra: pip install 'mmtp\[video\]'"):
        decode_video(data)
    with pytest.raises(DataError, match=r"writing MP4 needs an extra"):
        encode_video(FRAMES, 8)
    assert decode_video(encode_video(FRAMES, 8, "gif")).frames.shape == FRAMES.shape
