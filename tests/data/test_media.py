import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmtp.data.errors import DecodeError, Reason
from mmtp.data.media import (
    contact_sheet,
    decode_image,
    decode_sound,
    encode_png,
    grid_crops,
    read_image,
    read_sound,
    resize,
    to_uint8,
    write_wav,
)

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((48, 36), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def refusal(data: bytes, **options) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode_image(data, **options)
    return caught.value


def wav(samples: np.ndarray, rate: int = 16000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_back_every_pixel(kind: str) -> None:
    picture = decode_image(encoded(PICTURE, kind))
    assert picture.shape == (3, 36, 48)
    assert picture.dtype == torch.float32
    np.testing.assert_array_equal(to_uint8(picture), np.asarray(PICTURE))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_decode_as_pillow_does(kind: str) -> None:
    data = encoded(PICTURE, kind)
    np.testing.assert_array_equal(to_uint8(decode_image(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PICTURE, kind, exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(to_uint8(decode_image(data)), np.asarray(wanted))


def test_broken_exif_counts_as_none() -> None:
    data = encoded(PICTURE, "JPEG")
    broken = data[:2] + b"\xff\xe1\x00\x0eExif\0\0II*\0\xff\xff" + data[2:]
    np.testing.assert_array_equal(decode_image(broken), decode_image(data))


def test_cmyk_becomes_rgb() -> None:
    picture = decode_image(encoded(PICTURE.convert("CMYK"), "JPEG", quality=98))
    assert np.abs(to_uint8(picture).astype(int) - np.asarray(PICTURE)).mean() < 4


def test_sixteen_bits_are_scaled_not_cut() -> None:
    grey = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(to_uint8(decode_image(encoded(Image.fromarray(grey))))[0, :, 0], [0, 1, 128, 255])


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert to_uint8(decode_image(encoded(clear))).min() == 255
    np.testing.assert_array_equal(to_uint8(decode_image(encoded(half)))[0, 0], [127] * 3)


def test_palette_with_transparent_entry_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    pixels = to_uint8(decode_image(encoded(image, transparency=0)))
    np.testing.assert_array_equal(pixels[0], [[255] * 3, [200, 100, 50]])


def test_grey_becomes_three_channels() -> None:
    pixels = to_uint8(decode_image(encoded(PICTURE.convert("L"))))
    np.testing.assert_array_equal(pixels, np.repeat(np.asarray(PICTURE.convert("L"))[..., None], 3, 2))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    pixels = to_uint8(decode_image(encoded(red, kind, save_all=True, append_images=[blue])))
    np.testing.assert_allclose(pixels[4, 4].astype(int), [255, 0, 0], atol=4)


def test_twenty_thousand_pixels_square_are_refused_unread() -> None:
    error = refusal(bomb(20_000))
    assert error.reason is Reason.TOO_LARGE
    assert str(error) == "more pixels than the 67,108,864 that are read"


def test_pixel_limit() -> None:
    error = refusal(bomb(9000))
    assert (error.reason, str(error)) == (Reason.TOO_LARGE, "9000 x 9000 pixels; at most 67,108,864 pixels are read")
    assert refusal(encoded(PICTURE), max_pixels=1727).reason is Reason.TOO_LARGE
    assert decode_image(encoded(PICTURE), max_pixels=1728).shape == (3, 36, 48)


def test_zero_bytes() -> None:
    error = refusal(b"")
    assert (error.reason, str(error)) == (Reason.EMPTY, "the file has zero bytes")


def test_text_named_png() -> None:
    error = refusal(b"hello, I am no picture")
    assert (error.reason, str(error)) == (Reason.NOT_MEDIA, "is no picture: it begins with b'hello, I'")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@given(part=st.floats(0.02, 0.97))
@settings(max_examples=15, deadline=None)
def test_truncated_files_are_refused(kind: str, part: float) -> None:
    data = encoded(PICTURE, kind)
    assert refusal(data[: max(8, int(part * len(data)))]).reason is Reason.TRUNCATED


def test_last_two_bytes_of_a_jpeg_matter() -> None:
    error = refusal(encoded(PICTURE, "JPEG")[:-2])
    assert (error.reason, str(error)) == (Reason.TRUNCATED, "the picture is damaged (Premature end of JPEG file)")


def test_truncated_png_names_the_byte() -> None:
    data = encoded(PICTURE)
    assert str(refusal(data[:-6])) == f"the PNG ends at byte {len(data) - 6}, before its last chunk"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_flipped_bit_of_a_png_is_refused(data: st.DataObject) -> None:
    damaged = bytearray(encoded(PICTURE))
    place = data.draw(st.integers(8, len(damaged) - 13))
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    assert refusal(bytes(damaged)).reason in (Reason.CORRUPT, Reason.TRUNCATED, Reason.TOO_LARGE, Reason.EMPTY)


def test_jpeg_damaged_in_its_middle_is_refused() -> None:
    data = bytearray(encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG"))
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff\xd9" * 20  # Pillow reads this in silence, half of it grey
    assert refusal(bytes(data)).reason in (Reason.CORRUPT, Reason.TRUNCATED)


def test_float_and_32_bit_samples_are_unsupported() -> None:
    assert refusal(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")).reason is Reason.UNSUPPORTED
    assert refusal(encoded(Image.fromarray(np.full((2, 2), 2**20, np.int32)), "TIFF")).reason is Reason.UNSUPPORTED


@given(data=st.binary(min_size=1, max_size=200))
@settings(max_examples=40, deadline=None)
def test_any_bytes_give_a_reason(data: bytes) -> None:
    for head in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\x40\0\0\0WEBP"):
        assert isinstance(refusal(head + data).reason, Reason)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_crop_keeps_proportions_and_cuts_evenly(kind: str) -> None:
    wide = Image.new("RGB", (96, 32), "blue")
    wide.paste("red", (32, 0, 64, 32))
    picture = decode_image(encoded(wide, kind, **({"quality": 100} if kind == "JPEG" else {})), size=(16, 16))
    assert picture.shape == (3, 16, 16)
    np.testing.assert_allclose(to_uint8(picture)[8, 4:12].mean(0), [255, 0, 0], atol=6)


def test_stretch_changes_proportions() -> None:
    wide = Image.new("RGB", (96, 32), "blue")
    wide.paste("red", (0, 0, 48, 32))
    pixels = to_uint8(decode_image(encoded(wide), size=(16, 16), fit="stretch"))
    np.testing.assert_array_equal(pixels[8, [1, 14]], [[255, 0, 0], [0, 0, 255]])


def test_enlarging_reaches_the_size() -> None:
    assert decode_image(encoded(PICTURE), size=(100, 70)).shape == (3, 100, 70)


def test_resize_agrees_with_pillow() -> None:
    array = np.asarray(PICTURE)
    ours = resize(torch.from_numpy(array.copy()).permute(2, 0, 1), (18, 24), "stretch").permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(PICTURE.resize((24, 18), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 2  # measured worst case: 1


def test_png_round_trip() -> None:
    picture = decode_image(encoded(PICTURE))
    torch.testing.assert_close(decode_image(encode_png(picture)), picture, rtol=0, atol=0)


def test_read_image_names_the_file(tmp_path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "fine.png").write_bytes(encoded(PICTURE))
    assert read_image(tmp_path / "fine.png").shape == (3, 36, 48)
    for name, reason, text in [
        ("gone.png", Reason.MISSING, "no such file"),
        ("folder.png", Reason.UNREADABLE, "cannot be read (Is a directory)"),
    ]:
        with pytest.raises(DecodeError) as caught:
            read_image(tmp_path / name)
        assert (caught.value.reason, str(caught.value)) == (reason, f"{tmp_path / name}: {text}")


def test_contact_sheet_places_pictures_in_rows() -> None:
    sheet = contact_sheet([torch.zeros(3, 4, 4), torch.zeros(3, 2, 4), torch.zeros(3, 4, 4)], columns=2, gap=1)
    assert sheet.shape == (3, 11, 11)
    assert sheet[0].eq(0).sum() == 4 * 4 + 2 * 4 + 4 * 4
    assert sheet[0, 1:5, 1:5].eq(0).all()
    assert sheet[0, 3:6, 6:10].eq(1).all()


TONE = 0.5 * np.sin(np.arange(16000) * 2 * np.pi * 440 / 16000)


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_sound_round_trip(kind: str) -> None:
    sound, rate = decode_sound(wav(TONE, kind=kind))
    assert (sound.shape, rate) == ((1, 16000), 16000)
    np.testing.assert_allclose(sound[0].numpy(), TONE, atol=1 / 32768)


BITS = {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 24, "FLOAT": 24, "DOUBLE": 24}


@pytest.mark.parametrize(("subtype", "bits"), BITS.items())
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_samples_of_any_width(subtype: str, bits: int, channels: int) -> None:
    sound, _ = decode_sound(wav(np.repeat(TONE[:, None], channels, 1), subtype=subtype))
    np.testing.assert_allclose(sound[0].numpy(), TONE, atol=2.0 ** (2 - bits))


def test_channels_are_averaged() -> None:
    sound, _ = decode_sound(wav(np.stack([TONE, -TONE], 1)))
    assert sound.abs().max() < 1e-4


def test_resampling_keeps_the_tone() -> None:
    sound, rate = decode_sound(wav(TONE), sample_rate=24000)
    assert (sound.shape, rate) == ((1, 24000), 24000)
    wanted = 0.5 * np.sin(np.arange(24000) * 2 * np.pi * 440 / 24000)
    np.testing.assert_allclose(sound[0].numpy()[200:-200], wanted[200:-200], atol=2e-3)


def test_loud_floats_are_divided_by_their_peak() -> None:
    sound, _ = decode_sound(wav(TONE * 80, subtype="FLOAT"))
    assert float(sound.abs().max()) == pytest.approx(1.0)
    np.testing.assert_allclose(sound[0].numpy(), TONE * 2, atol=1e-3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (wav(np.zeros(0)), Reason.EMPTY),
        (b"no sound at all, only words", Reason.NOT_MEDIA),
        (wav(TONE)[:20000], Reason.TRUNCATED),
        (wav(np.array([0.0, np.nan, 0.1]), subtype="FLOAT"), Reason.NOT_FINITE),
        (b"fLaC" + bytes(60), Reason.CORRUPT),
    ],
    # Float files hold the time of writing: as names they would differ between the processes that collect them.
    ids=["zero-byte", "no-samples", "words", "truncated", "nan", "flac-header"],
)
def test_bad_sounds(data: bytes, reason: Reason) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_sound(data)
    assert caught.value.reason is reason


def test_cut_flac_is_refused() -> None:
    data = wav(TONE + RNG.normal(0, 0.01, 16000), kind="FLAC")
    with pytest.raises(DecodeError) as caught:
        decode_sound(data[: len(data) // 2])
    assert caught.value.reason in (Reason.TRUNCATED, Reason.CORRUPT)


def test_long_sounds_are_refused() -> None:
    with pytest.raises(DecodeError, match=r"1 s of sound; at most 0\.5 s are read") as caught:
        decode_sound(wav(TONE), max_seconds=0.5)
    assert caught.value.reason is Reason.TOO_LARGE


def test_written_sounds_are_read_back(tmp_path) -> None:
    write_wav(tmp_path / "tone.wav", torch.from_numpy(TONE).float()[None], 16000)
    np.testing.assert_allclose(read_sound(tmp_path / "tone.wav")[0][0].numpy(), TONE, atol=1 / 16384)


def test_crops_lie_side_by_side_around_the_middle():
    picture = torch.arange(7 * 11).reshape(1, 7, 11).expand(3, 7, 11).float()
    crops = grid_crops(picture, (3, 4))
    corners = [(y, x) for y in (0, 3) for x in (1, 5)]
    assert len(crops) == 4
    assert all(torch.equal(crop, picture[:, y : y + 3, x : x + 4]) for crop, (y, x) in zip(crops, corners, strict=True))
    assert len(grid_crops(picture, (7, 11))) == 1 and grid_crops(picture, (8, 3)) == []
