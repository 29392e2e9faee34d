"""Video files to tensors and back: float ``[3, t, h, w]`` in 0..1.

MP4, MOV, Matroska, WebM, AVI and MPEG are read by FFmpeg through PyAV (extra ``video``); animated GIF, WebP and PNG by Pillow. A still
picture is a video of one frame. As with pictures (see :mod:`mmtp.data.media`) transparency is laid on white, rotation is applied (that of
the file's display matrix, in quarter turns), and damage is refused, never patched up. Sound tracks are left alone.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmtp.data.errors import DataError, DecodeError, Reason
from mmtp.data.media import MAX_PIXELS, Fit, damage, decode_image, resize, to_rgb, to_uint8

MAX_VIDEO_PIXELS = 2**27
"""Over all frames, as they are kept: 1.5 GiB of floats."""

STILL_RATE = 10.0
"""Frames per second where a file does not say: browsers show GIFs without times at this pace."""

Container = Literal["mp4", "gif"]

_PICTURES = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_EPSILON = 1e-4  # seconds; times in files are whole ticks of a clock


@dataclass(frozen=True)
class Video:
    """A video, decoded.

    Attributes:
        frames: pixels in 0..1.
        times: when each frame is shown, in seconds after the first.
        frame_rate: frames per second, the mean where they are unevenly spaced.
    """

    frames: Float[Tensor, "3 t h w"]
    times: Float[Tensor, " t"]
    frame_rate: float


Shown = tuple[float, float, UInt8[Tensor, "3 h w"]]
"""From when, until when, and what."""


def decode_video(
    data: bytes,
    *,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    frame_rate: float | None = None,
    max_pixels: int = MAX_PIXELS,
    max_video_pixels: int = MAX_VIDEO_PIXELS,
) -> Video:
    """A video file, an animation or a picture.

    Args:
        data: the file.
        size: (height, width) to bring frames to; None keeps their own.
        fit: how, as :func:`~mmtp.data.media.decode_image` has it.
        frame_rate: frames per second to bring it to, by leaving frames out and showing frames again; None keeps all frames as they are.
        max_pixels: larger frames are refused.
        max_video_pixels: longer videos are refused: pixels over all frames, after they are brought to ``size`` and ``frame_rate``.

    Raises:
        DecodeError: with a reason code.
        DataError: the file needs PyAV, which is not installed.
    """
    if not data:
        raise DecodeError(Reason.EMPTY, "the file has zero bytes")
    if (animation := _open_picture(data)) is None:
        shown = _film(data, max_pixels)
    elif getattr(animation, "n_frames", 1) > 1:
        shown = _animation(animation, data, max_pixels)
    else:
        return Video(decode_image(data, size=size, fit=fit, max_pixels=max_pixels)[:, None], torch.zeros(1), frame_rate or STILL_RATE)
    frames, times, total, length = [], [], 0, 0.0
    for start, end, picture in _at_rate(shown, frame_rate) if frame_rate else shown:
        picture = picture if size is None else resize(picture, size, fit)
        total += picture[0].numel()
        if total > max_video_pixels:
            more = f"more than {max_video_pixels:,} pixels over its frames, which is all that is read at once"
            raise DecodeError(Reason.TOO_LARGE, f"{more}; give it a size or a lower frame rate, or cut it")
        if frames and picture.shape != frames[0].shape:
            raise DecodeError(Reason.UNSUPPORTED, f"frame {len(frames)} is of another size than those before")
        frames.append(picture)
        times.append(start)
        length = end
    if not frames:
        raise DecodeError(Reason.EMPTY, "the file holds no frames")
    rate = frame_rate or (len(frames) / length if length > 0 else STILL_RATE)
    return Video(torch.stack(frames, 1).float().div_(255), torch.tensor(times), rate)


def encode_video(frames: Float[Tensor, "3 t h w"], frame_rate: float, container: Container = "mp4") -> bytes:
    """A video in 0..1 as a file.

    MP4 is H.264 (with colours at half the resolution where both sides are even, as every player wants it, else at full); GIF has 256
    colours a frame and times in hundredths of a second. Both lose a little.

    Raises:
        DataError: MP4 needs PyAV, which is not installed.
    """
    pictures = [to_uint8(frames[:, t]) for t in range(frames.shape[1])]
    out = io.BytesIO()
    if container == "gif":
        first, *rest = (Image.fromarray(p) for p in pictures)
        first.save(out, "GIF", save_all=True, append_images=rest, duration=round(1000 / frame_rate), loop=0)
        return out.getvalue()
    av = _av("writing MP4")
    height, width = frames.shape[2:]
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(60_000), options={"crf": "16"})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return out.getvalue()


def _open_picture(data: bytes) -> Image.Image | None:
    """The picture or animation that these bytes are, if they are one."""
    try:
        return Image.open(io.BytesIO(data), formats=_PICTURES)
    except UnidentifiedImageError:
        return None
    except Exception as error:  # plug-ins of Pillow raise whatever their parsing runs into
        raise damage(error, data) from error


def _animation(image: Image.Image, data: bytes, max_pixels: int) -> Iterator[Shown]:
    """Frames of an animated GIF, WebP or PNG."""
    _check_pixels(image.width, image.height, max_pixels)
    start = 0.0
    with image:
        for i in range(image.n_frames):  # type: ignore[attr-defined]
            try:
                image.seek(i)
                pixels = to_rgb(image)
            except Exception as error:
                raise damage(error, data) from error
            # Where a frame has no time, browsers give it a tenth of a second.
            end = start + ((image.info.get("duration") or 0) / 1000 or 1 / STILL_RATE)
            yield start, end, _tensor(pixels)
            start = end


def _film(data: bytes, max_pixels: int) -> Iterator[Shown]:
    """Frames of a file that FFmpeg reads."""
    av = _av("reading video files")
    known = data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide") or data.startswith((b"\x1a\x45\xdf\xa3", b"RIFF", b"\0\0\1"))
    try:
        with av.open(io.BytesIO(data)) as file:
            if not file.streams.video:
                raise DecodeError(Reason.NOT_MEDIA, "the file holds no video")
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1  # there is a worker for each core already
            stream.codec_context.options = {"err_detect": "explode"}
            _check_pixels(stream.width, stream.height, max_pixels)
            if _matroska_is_cut(data):
                raise DecodeError(Reason.TRUNCATED, "the file ends before its video does")
            pending: tuple[float, Tensor] | None = None
            step, origin = 1 / float(stream.average_rate or STILL_RATE), None
            for frame in _frames(file, stream):
                time = frame.time if frame.time is not None else (pending[0] + origin + step if pending else 0.0)  # pyrefly: ignore
                origin = time if origin is None else origin
                if pending is not None:
                    yield pending[0], time - origin, pending[1]
                pending = time - origin, _tensor(_upright(frame))
            if pending is not None:
                yield pending[0], pending[0] + step, pending[1]
    except av.FFmpegError as error:
        text = f"({error.strerror or error})"
        if known:
            raise DecodeError(Reason.CORRUPT, f"the video is damaged or cut off {text}") from error
        raise DecodeError(Reason.NOT_MEDIA, f"is no video: it begins with {data[:8]!r} {text}") from error


def _frames(file: Any, stream: Any) -> Iterator[Any]:
    """All frames of a stream, which must have as many packets as its file says."""
    packets = 0
    for packet in file.demux(stream):
        packets += packet.size > 0
        if packet.is_corrupt:
            raise DecodeError(Reason.CORRUPT, f"packet {packets} of the video is damaged")
        if packet.size == 0 and packets < stream.frames:
            raise DecodeError(Reason.TRUNCATED, f"the file holds {packets} of the {stream.frames} frames that it speaks of")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DecodeError(Reason.CORRUPT, "a frame of the video is damaged")
            yield frame


def _upright(frame: Any) -> np.ndarray:
    """Pixels ``[h, w, 3]`` of a frame, on white, turned as the file says."""
    if any(component.is_alpha for component in frame.format.components):
        pixels = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round((frame.rotation or 0) / 90))


def _at_rate(shown: Iterator[Shown], frame_rate: float) -> Iterator[Shown]:
    """What is seen at every multiple of a frame's time."""
    count = 0
    for _, end, picture in shown:
        while count / frame_rate < end - _EPSILON:
            yield count / frame_rate, (count + 1) / frame_rate, picture
            count += 1


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DecodeError(Reason.TOO_LARGE, f"frames of {width} x {height} pixels; at most {max_pixels:,} pixels are read")


def _tensor(pixels: np.ndarray) -> UInt8[Tensor, "3 h w"]:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def _matroska_is_cut(data: bytes) -> bool:
    """Whether a Matroska or WebM file's segment claims more bytes than there are: FFmpeg reads what is there in silence (RFC 9559)."""
    at = data.find(b"\x18\x53\x80\x67") if data.startswith(b"\x1a\x45\xdf\xa3") else -1
    if at < 0 or at + 12 > len(data):
        return False
    width = 9 - data[at + 4].bit_length()
    size = struct.unpack(">Q", data[at + 4 : at + 12])[0] >> 8 * (8 - width) & (1 << 7 * width) - 1
    return size != (1 << 7 * width) - 1 and at + 4 + width + size > len(data)  # all ones: not known when it was begun


def _av(what: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(f"{what} needs an extra: pip install 'mmtp[video]'") from error
    return av
