"""Decode image files to RGB pixels: as they are, or as squares of one size. Encode pixels as PNG.

Whatever the bytes hold, only BadImage is raised.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from dde_core.config import Background

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""PIL tries no other decoder."""
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "La", "RGBa", "YCbCr"}
_DEEP = re.compile(r"\b(L|LA|RGB|RGBA|RGBa|RGBX);16")
"""Raw modes with more than 8 bits a channel, which PIL may truncate to 8 ("RGB;16B")."""
_PNG = b"\x89PNG\r\n\x1a\n"
_HEADERS = {
    _PNG: (16, ">II"),
    b"GIF8": (6, "<HH"),
    b"BM": (18, "<ii"),
    b"\xff\xd8\xff": (3, ""),
    b"RIFF": (12, ""),
    b"II*\0": (4, ""),
    b"MM\0*": (4, ""),
}
"""Magic bytes -> (offset, struct format) of width and height; the format is "" where the offset varies."""
_PIXEL_CHUNKS = {b"tRNS", b"acTL", b"fcTL", b"fdAT"}
"""Of the PNG chunks that a decoder may ignore, those that change the pixels, or make them an animation."""
_ORIENTATION_CHUNKS = {b"eXIf", b"iTXt", b"tEXt", b"zTXt"}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what turns the image upright; 1 is upright."""
MAX_PIXELS = 1 << 26
MAX_FILE_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """``pixels`` uint8 [size, size, 3].

    ``size`` is the upright original's (height, width) and ``crop`` the center crop's (top, left) in it, both
    in pixels. ``transparent``: some pixels of the crop show the background.
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    crop: tuple[int, int]
    transparent: bool


class BadImage(ValueError):
    """An image that cannot be used. ``cause`` is an identifier for counting, ``detail`` is for people."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


def decode(
    data: bytes | None, size: int, flip: bool = False, background: Background = "white"
) -> DecodedImage:
    """Decode an image, rotate it upright (EXIF), crop the center square, resize that to ``size`` pixels.

    ``flip`` mirrors it left to right. Transparent pixels show the ``background``. Raises BadImage.
    """
    square, width, height, is_transparent = _rgb(data, background, to_square=True)
    side = min(width, height)
    if square.width != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    if flip:
        square = ImageOps.mirror(square)
    return DecodedImage(
        pixels=np.array(square),
        size=(height, width),
        crop=((height - side) // 2, (width - side) // 2),
        transparent=is_transparent,
    )


def decode_whole(data: bytes | None, background: Background = "white") -> NDArray[np.uint8]:
    """Decode an image as ``decode`` does, but neither crop nor resize it: uint8 [height width 3].

    Raises BadImage.
    """
    return np.array(_rgb(data, background, to_square=False)[0])


def _rgb(
    data: bytes | None, background: Background, *, to_square: bool
) -> tuple[Image.Image, int, int, bool]:
    """The upright image as RGB, or its center square; the upright image's width and height; and whether the
    background shows.

    Raises BadImage.
    """
    if data is None:
        raise BadImage("image_missing")
    if not data:
        raise BadImage("image_empty")
    if len(data) > MAX_FILE_BYTES:
        raise BadImage("image_too_large", f"more than {MAX_FILE_BYTES} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image, width, height = _upright(data, to_square)
            rgb, is_transparent = _on_background(image, background)
            return rgb, width, height, is_transparent
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Image.DecompressionBombError as error:
        raise BadImage("image_too_large", str(error)) from error
    except Exception as error:  # on crafted bytes a decoder may raise anything
        raise BadImage("image_broken", f"{type(error).__name__}: {error}"[:200]) from error


def _upright(data: bytes, to_square: bool) -> tuple[Image.Image, int, int]:
    """The upright image in the file's mode, or its center square; and the upright image's width and height.

    The header is checked before anything is decoded. At most one copy of the pixels is made.
    """
    with Image.open(io.BytesIO(_without_metadata(data)), formats=FORMATS) as file:
        _check(file)
        file.load()
        turn = _UPRIGHT.get(_orientation(file))
    image = file if turn is None else file.transpose(turn)
    del file  # and its pixels, if they were turned
    width, height = image.size
    if width == height or not to_square:
        return image, width, height
    side = min(width, height)
    left = (width - side) // 2
    top = (height - side) // 2
    return image.crop((left, top, left + side, top + side)), width, height


def _without_metadata(data: bytes) -> bytes:
    """A PNG file without chunks that neither its pixels nor its orientation need; another file as it is.

    PIL gives up the image for a broken chunk of whatever kind. Those of the orientation stay if their
    checksum is right.
    """
    if not data.startswith(_PNG):
        return data
    view = memoryview(data)
    kept = [view[: len(_PNG)]]
    start = len(_PNG)
    while start < len(data):
        length = int.from_bytes(view[start : start + 4])
        kind = bytes(view[start + 4 : start + 8])
        end = start + length + 12
        if kind[:1].isupper() or kind in _PIXEL_CHUNKS:
            kept.append(view[start:end])
        elif kind in _ORIENTATION_CHUNKS:
            checksum = int.from_bytes(view[end - 4 : end])
            if zlib.crc32(view[start + 4 : end - 4]) == checksum:
                kept.append(view[start:end])
        start = end
    return b"".join(kept)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, from 1 to 8; 1 where the metadata cannot be read: the pixels still can."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in _UPRIGHT else 1
    except Exception:  # on crafted bytes the parser may raise anything
        return 1


def _on_background(image: Image.Image, background: Background) -> tuple[Image.Image, bool]:
    """The image as RGB, its transparent pixels on the background; and whether it has any.

    Raises BadImage where nothing but the background would be seen.
    """
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB"), False
    if image.mode == "La":  # gray, multiplied by its alpha
        image = image.convert("LA")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    alphas = image.getchannel("A").histogram()
    if not any(alphas[1:]):
        raise BadImage("image_transparent", "every pixel is fully transparent")
    if not any(alphas[:255]):
        return image.convert("RGB"), False
    on_background = Image.new("RGB", image.size, background)
    on_background.paste(image, mask=image)
    return on_background, True


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


def to_png(
    pixels: NDArray[np.uint8], level: int | None = None, text: Mapping[str, str] | None = None
) -> bytes:
    """uint8 [h, w, 3] as PNG, which keeps every value. ``level`` is zlib's (by default 6).

    Each keyword of ``text`` becomes a text chunk (iTXt, UTF-8).
    """
    options: dict[str, Any] = {} if level is None else {"compress_level": level}
    if text:
        options["pnginfo"] = PngInfo()
        for keyword, value in text.items():
            options["pnginfo"].add_itxt(keyword, value)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()
