"""Files to tensors and back: pictures as float ``[3, h, w]`` in 0..1, sound as float ``[1, t]`` in -1..1.

What happens to unusual pictures, so that equal files give equal tensors everywhere:

- EXIF rotation is applied; broken EXIF counts as none.
- Transparency (alpha, palette or key colour) is laid on white.
- 16-bit samples are scaled (not cut) to 8 bits; grey becomes three equal channels; CMYK is converted without colour profile.
- Of an animation the first frame is taken.
- More than ``MAX_PIXELS`` pixels are refused from the header, before anything is decoded.
- Damage is refused, never patched up: a half-grey picture is worse than one fewer.
"""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmtp.data.errors import DecodeError, Reason

MAX_PIXELS = 2**26
MAX_SECONDS = 3600.0

Fit = Literal["crop", "stretch"]

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_TRUNCATED = ("truncat", "premature", "unexpected end", "not processed", "buffer is not large enough", "end of data")
_ORIENTATION_TAG = 0x0112


def decode_image(
    data: bytes, *, size: tuple[int, int] | None = None, fit: Fit = "crop", max_pixels: int = MAX_PIXELS
) -> Float[Tensor, "3 h w"]:
    """A picture file as RGB in 0..1.

    Args:
        data: the file: JPEG, PNG, WebP, GIF, BMP, TIFF and what else Pillow reads.
        size: (height, width) to bring it to; None keeps its own.
        fit: how: ``"crop"`` covers the frame and cuts evenly what hangs over, ``"stretch"`` changes the proportions.
        max_pixels: larger pictures are refused.

    Raises:
        DecodeError: with a reason code; see the head of this module.
    """
    if not data:
        raise DecodeError(Reason.EMPTY, "the file has zero bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that is judged below by our own rules
        pixels = _decode_rgb(data, size, max_pixels)
    picture = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)
    if size is not None:
        picture = resize(picture, size, fit)
    return picture.float().div_(255).contiguous()


def read_image(path: str | Path, **options: Any) -> Float[Tensor, "3 h w"]:
    """The picture of a path; ``options`` as :func:`decode_image` has them.

    Raises:
        DecodeError: its text names the file.
    """
    try:
        return decode_image(read_bytes(Path(path)), **options)
    except DecodeError as error:
        raise DecodeError(error.reason, f"{path}: {error}") from error


def read_sound(path: str | Path, **options: Any) -> tuple[Float[Tensor, "1 t"], int]:
    """The sound of a path and its rate; ``options`` as :func:`decode_sound` has them.

    Raises:
        DecodeError: its text names the file.
    """
    try:
        return decode_sound(read_bytes(Path(path)), **options)
    except DecodeError as error:
        raise DecodeError(error.reason, f"{path}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """A whole file.

    Raises:
        DecodeError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DecodeError(Reason.MISSING, "no such file") from error
    except OSError as error:
        raise DecodeError(Reason.UNREADABLE, f"cannot be read ({error.strerror})") from error


def resize(picture: Tensor, size: tuple[int, int], fit: Fit = "crop") -> Tensor:
    """Bicubic with antialiasing (uint8 in, uint8 out; float in, float clamped to 0..1 out); ``size`` is (height, width)."""
    height, width = size
    if fit == "crop":
        scale = max(height / picture.shape[1], width / picture.shape[2])
        scaled = (max(height, round(picture.shape[1] * scale)), max(width, round(picture.shape[2] * scale)))
    else:
        scaled = size
    if tuple(picture.shape[1:]) != scaled:
        # Channels last is the layout for which torch has a uint8 kernel; the batch axis is what interpolate wants.
        batch = picture[None].contiguous(memory_format=torch.channels_last)
        picture = torch.nn.functional.interpolate(batch, scaled, mode="bicubic", antialias=True)[0]
        picture = picture if picture.dtype == torch.uint8 else picture.clamp(0, 1)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return picture[:, top : top + height, left : left + width].contiguous()


def grid_crops(picture: Float[Tensor, "3 h w"], size: tuple[int, int]) -> list[Float[Tensor, "3 h2 w2"]]:
    """As many crops of ``size`` (height, width) as lie side by side in a picture, row by row.

    They do not overlap, and what is left over is shared evenly between opposite borders. A picture that is smaller along either axis
    has none.
    """
    (rows, top), (columns, left) = ((n // crop, n % crop // 2) for n, crop in zip(picture.shape[1:], size, strict=True))
    height, width = size
    corners = ((top + height * row, left + width * column) for row in range(rows) for column in range(columns))
    return [picture[:, y : y + height, x : x + width].contiguous() for y, x in corners]


def decode_sound(
    data: bytes, *, sample_rate: float | int | None = None, max_seconds: float = MAX_SECONDS
) -> tuple[Float[Tensor, "1 t"], int]:
    """A sound file as mono in -1..1, and its rate.

    Channels are averaged. A file of floats that is louder than 1 is divided by its peak.

    Args:
        data: the file: WAV, FLAC, OGG, MP3 and what else libsndfile reads.
        sample_rate: rate to bring it to (windowed sinc, torchaudio); None keeps its own.
        max_seconds: longer sounds are refused.

    Raises:
        DecodeError: with a reason code.
    """
    import soundfile

    if not data:
        raise DecodeError(Reason.EMPTY, "the file has zero bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames > max_seconds * file.samplerate:
                raise DecodeError(Reason.TOO_LARGE, f"{file.frames / file.samplerate:g} s of sound; at most {max_seconds:g} s are read")
            rate, frames = file.samplerate, file.frames
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        reason = Reason.CORRUPT if data[:4] in (b"RIFF", b"fLaC", b"OggS") else Reason.NOT_MEDIA
        raise DecodeError(reason, f"cannot be read as sound ({str(error).rstrip('.')})") from error
    if len(samples) < frames or _wav_is_cut(data):
        raise DecodeError(Reason.TRUNCATED, "the file ends before its sound does")
    if not len(samples):
        raise DecodeError(Reason.EMPTY, "the file holds no samples")
    if not np.isfinite(samples).all():
        raise DecodeError(Reason.NOT_FINITE, "the file holds samples that are not finite")
    sound = torch.from_numpy(samples.mean(1))[None]
    if (peak := float(sound.abs().max())) > 1:
        sound = sound / peak
    if sample_rate is not None and int(sample_rate) != rate:
        import torchaudio

        sound = torchaudio.functional.resample(sound, rate, int(sample_rate)).clamp_(-1, 1)
        rate = int(sample_rate)
    return sound.contiguous(), rate


def encode_png(picture: Float[Tensor, "3 h w"]) -> bytes:
    """A picture in 0..1 as PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(to_uint8(picture)).save(out, "PNG")
    return out.getvalue()


def to_uint8(picture: Float[Tensor, "3 h w"]) -> np.ndarray:
    """A picture in 0..1 as an array ``[h, w, 3]`` of bytes, rounded to the nearest."""
    return picture.detach().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def write_wav(path: Path, sound: Float[Tensor, "1 t"], sample_rate: float | int) -> None:
    """Writes a sound in -1..1 as 16-bit WAV."""
    import soundfile

    soundfile.write(path, sound[0].detach().clamp(-1, 1).cpu().numpy(), int(sample_rate), subtype="PCM_16")


def contact_sheet(pictures: Sequence[Float[Tensor, "3 _ _"]], columns: int | None = None, gap: int = 2) -> Float[Tensor, "3 h w"]:
    """Pictures side by side on white, row by row; each stands in the top left of a cell as large as the largest."""
    columns = columns or max(1, math.ceil(math.sqrt(len(pictures))))
    height, width = (max(p.shape[axis] for p in pictures) + gap for axis in (1, 2))
    sheet = torch.ones(3, height * math.ceil(len(pictures) / columns) + gap, width * min(columns, len(pictures)) + gap)
    for i, picture in enumerate(pictures):
        top, left = gap + height * (i // columns), gap + width * (i % columns)
        sheet[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture.cpu()
    return sheet


def _decode_rgb(data: bytes, size: tuple[int, int] | None, max_pixels: int) -> np.ndarray:
    """Pixels ``[h, w, 3]`` of bytes, upright; larger than ``size`` where that was not reached while decoding."""
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise DecodeError(Reason.TOO_LARGE, f"more pixels than the {max_pixels:,} that are read") from error
    except UnidentifiedImageError as error:
        if data.startswith(_MAGIC) or data[4:8] == b"ftyp":
            raise DecodeError(Reason.TRUNCATED, "the file ends, or is damaged, within its header") from error
        raise DecodeError(Reason.NOT_MEDIA, f"is no picture: it begins with {data[:8]!r}") from error
    except Exception as error:  # plug-ins of Pillow raise whatever their parsing runs into
        raise damage(error, data) from error
    with image:
        if image.width * image.height > max_pixels:
            raise DecodeError(Reason.TOO_LARGE, f"{image.width} x {image.height} pixels; at most {max_pixels:,} pixels are read")
        if not image.width * image.height:
            raise DecodeError(Reason.EMPTY, "the picture has no pixels")
        orientation = _orientation(image)
        try:
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                pixels = _decode_jpeg(data, size, orientation)
            else:
                if image.format == "PNG":
                    _check_png(data)
                pixels = to_rgb(image)
        except DecodeError:
            raise
        except Exception as error:
            raise damage(error, data) from error
    return _upright(pixels, orientation)


def _decode_jpeg(data: bytes, size: tuple[int, int] | None, orientation: int) -> np.ndarray:
    """Full size, or the smallest power-of-two reduction that still has twice the pixels wanted along each side."""
    height, width = (0, 0) if size is None else (2 * size[0], 2 * size[1])
    if orientation >= 5:
        height, width = width, height
    factor = 1 if size is None else 2
    return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=factor)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels ``[h, w, 3]`` of bytes, by the rules at the head of this module.

    Raises:
        DecodeError: samples of a kind that has no agreed white.
    """
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise DecodeError(Reason.UNSUPPORTED, "32-bit samples have no agreed white; convert the file to 8 or 16 bits")
        grey = ((wide + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise DecodeError(Reason.UNSUPPORTED, "floating-point samples have no agreed white; convert the file to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # EXIF is written by careless cameras; what cannot be read is none
        return 1
    # Pillow's TIFF reader turns the picture by itself.
    return value if value in range(1, 9) and image.format != "TIFF" else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes the eight EXIF orientations (EXIF 2.3, section 4.6.4)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _check_png(data: bytes) -> None:
    """Checks the CRC of the chunks that make the picture: Pillow skips those of the pixel data."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(data):
            break
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"tRNS") and zlib.crc32(data[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise DecodeError(Reason.CORRUPT, f"the PNG chunk {kind.decode()} at byte {at} is damaged")
        if kind == b"IEND":
            return
        at = end + 4
    raise DecodeError(Reason.TRUNCATED, f"the PNG ends at byte {len(data)}, before its last chunk")


def _wav_is_cut(data: bytes) -> bool:
    """Whether a RIFF file's sound chunk claims more bytes than there are: libsndfile reads such a file in silence."""
    if data[:4] != b"RIFF":
        return False
    at = 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        if kind == b"data":
            return length not in (0, 0xFFFFFFFF) and at + 8 + length > len(data)  # both stand for "unknown" in streamed files
        at += 8 + length + length % 2
    return False


def damage(error: Exception, data: bytes) -> DecodeError:
    """What an exception of a decoder says of a picture: that it is cut off, or damaged."""
    text = str(error).strip().rstrip(".") or type(error).__name__
    if data.startswith(b"\xff\xd8"):
        cut = not data.rstrip(b"\0").endswith(b"\xff\xd9")  # JPEG's last marker
    else:
        cut = data[:4] == b"RIFF" and struct.unpack("<I", data[4:8].ljust(4, b"\xff"))[0] + 8 > len(data)  # WebP
    truncated = cut or any(word in text.lower() for word in _TRUNCATED)
    return DecodeError(Reason.TRUNCATED if truncated else Reason.CORRUPT, f"the picture is damaged ({text})")
