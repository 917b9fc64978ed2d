"""Decode image files to square RGB pixels of one size.

Whatever the bytes hold, only BadImage is raised.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""PIL tries no other decoder."""
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "La", "RGBa", "YCbCr"}
_DEEP = re.compile(r"\b(L|LA|RGB|RGBA|RGBa|RGBX);16")
"""Raw modes with more than 8 bits a channel, which PIL may truncate to 8 ("RGB;16B")."""
_HEADERS = {
    b"\x89PNG\r\n\x1a\n": (16, ">II"),
    b"GIF8": (6, "<HH"),
    b"BM": (18, "<ii"),
    b"\xff\xd8\xff": (3, ""),
    b"RIFF": (12, ""),
    b"II*\0": (4, ""),
    b"MM\0*": (4, ""),
}
"""Magic bytes -> (offset, struct format) of width and height; the format is "" where the offset varies."""
MAX_PIXELS = 1 << 26
MAX_FILE_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """``pixels`` uint8 [size, size, 3].

    ``size`` is the upright original's (height, width) and ``crop`` the center crop's (top, left) in it, both
    in pixels.
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    crop: tuple[int, int]


class BadImage(ValueError):
    """An image that cannot be used. ``cause`` is an identifier for counting, ``detail`` is for people."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


def decode(data: bytes | None, size: int, flip: bool = False) -> DecodedImage:
    """Decode an image, rotate it upright (EXIF), crop the center square, resize that to ``size`` pixels.

    ``flip`` mirrors it left to right. Raises BadImage.
    """
    if data is None:
        raise BadImage("image_missing")
    if not data:
        raise BadImage("image_empty")
    if len(data) > MAX_FILE_BYTES:
        raise BadImage("image_too_large", f"more than {MAX_FILE_BYTES} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        square, width, height = _rgb_square(data)
    side = min(width, height)
    if square.width != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    if flip:
        square = ImageOps.mirror(square)
    return DecodedImage(
        pixels=np.array(square),
        size=(height, width),
        crop=((height - side) // 2, (width - side) // 2),
    )


def _rgb_square(data: bytes) -> tuple[Image.Image, int, int]:
    """The center square as RGB, and the upright image's width and height. Raises BadImage."""
    try:
        square, width, height = _center_square(data)
        rgb = square if square.mode == "RGB" else square.convert("RGB")
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Image.DecompressionBombError as error:
        raise BadImage("image_too_large", str(error)) from error
    except Exception as error:  # on crafted bytes a decoder may raise anything
        raise BadImage("image_broken", f"{type(error).__name__}: {error}"[:200]) from error
    return rgb, width, height


def _center_square(data: bytes) -> tuple[Image.Image, int, int]:
    """The center square in the file's mode, and the upright image's width and height.

    The header is checked before anything is decoded. At most one copy of the pixels is made.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check(image)
        ImageOps.exif_transpose(image, in_place=True)
        width, height = image.size
        if width == height:
            return image, width, height
        side = min(width, height)
        left = (width - side) // 2
        top = (height - side) // 2
        return image.crop((left, top, left + side, top + side)), width, height


def _check(image: ImageFile.ImageFile) -> None:
    """Raises BadImage for an image that is too large, or whose colors or frame would have to be guessed."""
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("image_too_large", f"{image.width}x{image.height} pixels")
    # MPO is a photo followed by previews. The frames are not counted: for a TIFF that takes quadratic time.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise BadImage("image_animated")
    if image.mode == "CMYK":
        raise BadImage("image_cmyk")
    if image.mode.startswith(("I", "F")) or any(_DEEP.search(str(tile.args)) for tile in image.tile):
        raise BadImage("image_16bit", f"mode {image.mode}")
    if image.mode not in MODES:
        raise BadImage("image_colour_space", f"mode {image.mode}")


def _unidentified(data: bytes) -> BadImage:
    """Why PIL identifies no image in the bytes.

    PIL itself does not distinguish a zero side, a broken header and another format.
    """
    for magic, (offset, sides) in _HEADERS.items():
        if data.startswith(magic):
            is_truncated = len(data) < offset + struct.calcsize(sides)
            has_zero_side = not is_truncated and 0 in struct.unpack_from(sides, data, offset)
            cause = "image_zero_size" if has_zero_side else "image_broken"
            return BadImage(cause, "its header cannot be read")
    return BadImage("image_not_an_image", f"{len(data)} bytes that are none of {', '.join(FORMATS)}")
