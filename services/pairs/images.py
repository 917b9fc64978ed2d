"""From the bytes of an image file to pixels of one size. Nothing that the bytes hold raises anything but BadImage."""

from __future__ import annotations

import io
import re
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""No other decoder is ever run."""
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "La", "RGBa", "YCbCr"}
_DEEP = re.compile(r"\b(L|LA|RGB|RGBA|RGBa|RGBX);16")
"""Raw modes of more than 8 bits a channel, which PIL may cut to 8 ("RGB;16B")."""
_HEADERS = {
    b"\x89PNG\r\n\x1a\n": (16, ">II"),
    b"GIF8": (6, "<HH"),
    b"BM": (18, "<ii"),
    b"\xff\xd8\xff": (3, ""),
    b"RIFF": (12, ""),
    b"II*\0": (4, ""),
    b"MM\0*": (4, ""),
}
"""How files begin, and where width and height stand in those whose header has them in a fixed place."""
MAX_PIXELS = 1 << 26
MAX_FILE_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """``pixels`` uint8 [size, size, 3]; the original (height, width) and the (top, left) of the centre crop, in pixels."""

    pixels: np.ndarray
    size: tuple[int, int]
    crop: tuple[int, int]


class BadImage(ValueError):
    """An image that cannot be used; ``cause`` is one word, ``detail`` says more."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


def decode(data: bytes | None, size: int, flip: bool = False) -> DecodedImage:
    """Decode, turn upright (EXIF), cut the centre square, resize to ``size`` pixels, mirror if ``flip``. Raises BadImage."""
    if data is None:
        raise BadImage("image_missing")
    if not data:
        raise BadImage("image_empty")
    if len(data) > MAX_FILE_BYTES:
        raise BadImage("image_too_large", f"more than {MAX_FILE_BYTES} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        square, width, height = _square(data)
    side = min(width, height)
    if square.width != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    if flip:
        square = ImageOps.mirror(square)
    return DecodedImage(np.array(square), (height, width), ((height - side) // 2, (width - side) // 2))


def _square(data: bytes) -> tuple[Image.Image, int, int]:
    """The centre square as RGB, and the upright image's width and height. Raises BadImage."""
    try:
        square, width, height = _cut(data)
        return square if square.mode == "RGB" else square.convert("RGB"), width, height
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Image.DecompressionBombError as error:
        raise BadImage("image_too_large", str(error)) from error
    except Exception as error:  # a decoder may raise anything on bytes that somebody made for it
        raise BadImage("image_broken", f"{type(error).__name__}: {error}"[:200]) from error


def _cut(data: bytes) -> tuple[Image.Image, int, int]:
    """The centre square in the file's mode, with at most one copy of the pixels beside it, and the upright image's sides.

    Everything the header tells is looked at before anything is decoded.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check(image)
        ImageOps.exif_transpose(image, in_place=True)
        side, width, height = min(image.size), *image.size
        left, top = (width - side) // 2, (height - side) // 2
        return image if width == height else image.crop((left, top, left + side, top + side)), width, height


def _check(image: ImageFile.ImageFile) -> None:
    """Raises BadImage for what is too large, or where we would have to guess the colours or the frame that was judged."""
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("image_too_large", f"{image.width}x{image.height} pixels")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo with previews behind it
        raise BadImage("image_animated")  # counting the frames of a TIFF takes their number squared
    if image.mode == "CMYK":
        raise BadImage("image_cmyk")
    if image.mode.startswith(("I", "F")) or any(_DEEP.search(str(tile.args)) for tile in image.tile):
        raise BadImage("image_16bit", f"mode {image.mode}")
    if image.mode not in MODES:
        raise BadImage("image_colour_space", f"mode {image.mode}")


def _unidentified(data: bytes) -> BadImage:
    """Why PIL knows no image in the bytes: it does not say that a side is zero, or that the rest of a header is broken."""
    for magic, (offset, sides) in _HEADERS.items():
        if data.startswith(magic):
            cut = len(data) < offset + struct.calcsize(sides)
            zero = not cut and 0 in struct.unpack_from(sides, data, offset)
            return BadImage("image_zero_size" if zero else "image_broken", "its header cannot be read")
    return BadImage("image_not_an_image", f"{len(data)} bytes that are none of {', '.join(FORMATS)}")
