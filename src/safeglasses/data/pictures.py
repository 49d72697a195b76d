"""A `Picture` of a user's data: where it is, whether it is sound, and its pixels; a `Video` of such pictures."""

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps

from safeglasses.errors import BadRow, SafeglassesError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded. Pillow knows more, but its EPS reader starts Ghostscript on the file."""
MAX_PIXELS = 64_000_000
"""A picture that claims more is taken for a decompression bomb."""
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, RuntimeError)
_DAMAGE += (struct.error, zlib.error)  # what Pillow's parsers let through on damaged bytes
_SKIP = "mend or replace the picture, or leave bad rows out with --skip-bad (in Python: skip_bad=True)"


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture in a message, as a file or as bytes. Two pictures are equal when their bytes are."""

    path: Path | None = None
    """The local file; not read when ``data`` is given."""
    data: bytes | None = field(default=None, repr=False)
    """The encoded picture itself (PNG, JPEG, …)."""

    def __post_init__(self) -> None:
        if self.path is None and self.data is None:
            raise SafeglassesError("a picture without a source", given="neither path nor data", expected="one of them")

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Picture) and self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def name(self) -> str:
        """What error messages call it."""
        return f"an embedded picture of {len(self.data or b''):,} bytes" if self.path is None else str(self.path)

    def read(self) -> bytes:
        """Return the encoded bytes.

        Raises:
            BadRow: the file is missing or cannot be read.
        """
        if self.data is not None:
            return self.data
        path = self.path or Path()
        try:
            if not path.is_file():
                kind = "not a file" if path.exists() else "no such file"
                raise BadRow("the picture is missing", given=f"{path} ({kind})", expected="a local file", do=_SKIP)
            return path.read_bytes()
        except (OSError, ValueError) as error:
            raise BadRow("the picture cannot be read", given=f"{path} ({error})", do=_SKIP) from error

    @cached_property
    def key(self) -> str:
        """SHA-256 of the encoded bytes, in hexadecimal."""
        return hashlib.sha256(self.read()).hexdigest()

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels as `open` gives them, from the header alone."""
        try:
            with Image.open(io.BytesIO(self.read()), formats=FORMATS) as image:
                turned = image.getexif().get(0x0112, 1) in {5, 6, 7, 8}
                return (image.height, image.width) if turned else image.size
        except _BOMBS as error:
            raise self._too_large(str(error)) from error
        except _DAMAGE as error:
            raise self._broken(error) from error

    def open(self) -> Image.Image:
        """Decode to RGB, upright by its EXIF orientation (as ``transformers.image_utils.load_image`` does).

        Raises:
            BadRow: missing, no picture, damaged, of a format or depth that is not read, or a bomb.
        """
        data = self.read()
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                self._refuse_pixels(image)
                image.verify()  # checksums; leaves the image unusable, hence the second open
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
                if "transparency" in upright.info:  # straight to RGB would warn about palettes
                    upright = upright.convert("RGBA")
                return upright.convert("RGB")
        except _BOMBS as error:
            raise self._too_large(str(error)) from error
        except _DAMAGE as error:
            raise self._broken(error) from error

    def _refuse_pixels(self, image: Image.Image) -> None:
        if image.width * image.height > MAX_PIXELS:
            raise self._too_large(f"{image.width} × {image.height}")
        if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
            raise BadRow(
                "the picture has no 8-bit colours",
                given=f"{self.name} (mode {image.mode})",
                expected="8 bits a channel; deeper ones would be cut off to white",
                do=_SKIP,
            )

    def _too_large(self, size: str) -> BadRow:
        return BadRow(
            "the picture is too large",
            given=f"{self.name} ({size})",
            expected=f"at most {MAX_PIXELS:,} pixels",
            do=_SKIP,
        )

    def _broken(self, error: BaseException) -> BadRow:
        return BadRow(
            "the picture cannot be decoded",
            given=f"{self.name} ({type(error).__name__})",
            expected="an undamaged " + ", ".join(FORMATS),
            do=_SKIP,
        )


@dataclass(frozen=True)
class Video:
    """A video in a message: its frames in order, all of which a model is shown."""

    frames: tuple[Picture, ...]
    """At least one; all of one size."""
    fps: float | None = None
    """Frames a second. None: as many as the model's own processor takes."""

    @property
    def key(self) -> list[object]:
        """The frames' hashes behind the rate: equal for equal videos."""
        return ["video", self.fps, *(frame.key for frame in self.frames)]
