"""A picture decodes to upright RGB, or says what is wrong with it."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safeglasses.data.pictures import MAX_PIXELS, Picture
from safeglasses.errors import BadRow, SafeglassesError

WAY_OUT = "  do:       mend or replace the picture, or leave bad rows out with --skip-bad (in Python: skip_bad=True)"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int = 12, height: int = 8) -> Image.Image:
    pixels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(pixels)


SAMPLES = {kind: encoded(gradient(), kind) for kind in FORMATS}


def bare_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_decodes(kind: str) -> None:
    picture = Picture(data=SAMPLES[kind])
    image = picture.open()
    assert (image.mode, image.size, picture.size) == ("RGB", (12, 8), (12, 8))
    if kind in {"PNG", "BMP", "TIFF", "PPM"}:
        assert image.tobytes() == gradient().tobytes()


def test_first_of_several_frames() -> None:
    for kind in ("GIF", "TIFF", "MPO"):
        data = encoded(gradient(), kind, save_all=True, append_images=[gradient().rotate(180)])
        with Image.open(io.BytesIO(data)) as image:
            assert image.n_frames == 2
            assert Picture(data=data).open().tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert Picture(data=encoded(gradient().convert(mode), kind)).open().mode == "RGB"


def test_palette_with_transparency_needs_no_warning() -> None:
    data = encoded(gradient().convert("P"), transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert Picture(data=data).open().tobytes() == expected.tobytes()


def test_exif_orientation_is_applied_to_pixels_and_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Picture(data=encoded(gradient(), exif=exif))
    assert picture.size == picture.open().size == (8, 12)
    assert picture.open().tobytes() == gradient().transpose(Image.Transpose.ROTATE_270).tobytes()


def test_pictures_are_equal_when_their_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(SAMPLES["PNG"])
    assert Picture(path=path) == Picture(data=SAMPLES["PNG"])
    assert hash(Picture(path=path)) == hash(Picture(data=SAMPLES["PNG"]))
    assert Picture(path=path) != Picture(data=SAMPLES["BMP"])
    assert Picture(path=path) != str(path)


def test_a_picture_needs_a_source() -> None:
    with pytest.raises(SafeglassesError) as error:
        Picture()
    assert str(error.value) == (
        "a picture without a source\n  given:    neither path nor data\n  expected: one of them"
    )


@pytest.mark.parametrize(("name", "why"), [("gone.png", "no such file"), (".", "not a file")])
def test_missing_picture(tmp_path: Path, name: str, why: str) -> None:
    path = tmp_path / name
    with pytest.raises(BadRow) as error:
        Picture(path=path).open()
    assert str(error.value) == (
        f"the picture is missing\n  given:    {path} ({why})\n  expected: a local file\n{WAY_OUT}"
    )


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"<svg/>", "UnidentifiedImageError"),
        (b"", "UnidentifiedImageError"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "UnidentifiedImageError"),
        (SAMPLES["PNG"][:-20], "OSError"),
        (SAMPLES["JPEG"][: len(SAMPLES["JPEG"]) * 2 // 3], "OSError"),
    ],
)
def test_damaged_picture(data: bytes, why: str) -> None:
    with pytest.raises(BadRow) as error:
        Picture(data=data).open()
    assert str(error.value) == (
        "the picture cannot be decoded\n"
        f"  given:    an embedded picture of {len(data):,} bytes ({why})\n"
        f"  expected: an undamaged PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM\n{WAY_OUT}"
    )


def test_a_flipped_bit_in_a_png_is_found() -> None:
    data = bytearray(SAMPLES["PNG"])
    data[-20] ^= 1
    with pytest.raises(BadRow, match="cannot be decoded"):
        Picture(data=bytes(data)).open()


def test_decompression_bombs_are_refused_by_their_header() -> None:
    side = int(MAX_PIXELS**0.5)
    data = bare_png(side, side + 1)
    with pytest.raises(BadRow) as error:
        Picture(data=data).open()
    assert str(error.value) == (
        "the picture is too large\n"
        f"  given:    an embedded picture of {len(data):,} bytes ({side} × {side + 1})\n"
        f"  expected: at most 64,000,000 pixels\n{WAY_OUT}"
    )
    for size in (10_000, 1_000_000):  # Pillow warns of the one and refuses the other
        for use in (Picture.open, lambda picture: picture.size):
            with pytest.raises(BadRow, match="the picture is too large"):
                use(Picture(data=bare_png(size, size)))


def test_deep_pictures_are_refused() -> None:
    data = encoded(Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16)))
    with pytest.raises(BadRow) as error:
        Picture(data=data).open()
    assert str(error.value) == (
        "the picture has no 8-bit colours\n"
        f"  given:    an embedded picture of {len(data):,} bytes (mode I;16)\n"
        f"  expected: 8 bits a channel; deeper ones would be cut off to white\n{WAY_OUT}"
    )


@given(st.sampled_from(FORMATS), st.data())
@settings(max_examples=100, deadline=None)
def test_whatever_the_bytes_there_is_a_picture_or_a_bad_row(kind: str, data: st.DataObject) -> None:
    content = bytearray(SAMPLES[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    picture = Picture(data=bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for use in (Picture.open, lambda picture: picture.size):
            try:
                use(picture)
            except BadRow as error:
                assert error.do
