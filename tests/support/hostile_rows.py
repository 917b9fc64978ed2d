"""Pick-a-Pic rows that a stranger could send, each with its expected outcome."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

JUNK = {
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='1e9' height='1e9'/></svg>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n(%pipe%id) (w) file\n",
    "pdf": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "zeros": bytes(64),
}


def drawn(rng: np.random.Generator, size: int = 24) -> np.ndarray:
    """A random image: uint8 [size, size, 3]."""
    return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)


def saved(pixels: np.ndarray, kind: str = "PNG", mode: str = "RGB", **options) -> bytes:
    """An image as a file of this kind and mode."""
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode == "RGB" else image.convert(mode)).save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    """A PNG chunk. ``length`` may differ from the data's."""
    return (
        struct.pack(">I", len(data) if length is None else length)
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )


def png_header(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    )


def png_of(width: int, height: int, body: bytes, depth: int = 8, color: int = 2) -> bytes:
    return png_header(width, height, depth, color) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def animated(rng: np.random.Generator, kind: str) -> bytes:
    frames, out = [Image.fromarray(drawn(rng)) for _ in range(3)], io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=50)
    return out.getvalue()


def deep(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 1 << 16, (24, 24), dtype=np.uint16)).save(out, "PNG")
    return out.getvalue()


def _flipped(rng: np.random.Generator) -> bytes:
    """A PNG with one byte flipped inside the compressed pixel data, so its checksum is wrong."""
    data = bytearray(png_of(24, 24, bytes(24 * 73)))
    data[-20] ^= 0xFF
    return bytes(data)


IMAGES: dict[str, tuple[str, Callable[[np.random.Generator], bytes | None]]] = {
    "null": ("image_missing", lambda rng: None),
    "no bytes": ("image_empty", lambda rng: b""),
    **{name: ("image_not_an_image", lambda rng, data=data: data) for name, data in JUNK.items()},
    "noise": ("image_not_an_image", lambda rng: b"\x01" + rng.bytes(200)),
    "half a jpeg": ("image_broken", lambda rng: _half(saved(drawn(rng), "JPEG"))),
    "half a png": ("image_broken", lambda rng: _half(saved(drawn(rng)))),
    "half a webp": ("image_broken", lambda rng: _half(saved(drawn(rng), "WEBP"))),
    "half a gif": ("image_broken", lambda rng: _half(saved(drawn(rng), "GIF"))),
    "half a tiff": ("image_broken", lambda rng: _half(saved(drawn(rng), "TIFF"))),
    "half a bmp": ("image_broken", lambda rng: _half(saved(drawn(rng), "BMP"))),
    "a png header alone": ("image_broken", lambda rng: png_header(24, 24)),
    "a chunk with a false length": (
        "image_broken",
        lambda rng: (
            png_header(24, 24) + chunk(b"IDAT", zlib.compress(bytes(24 * 73)), length=5) + chunk(b"IEND", b"")
        ),
    ),
    "a flipped byte": ("image_broken", _flipped),
    "a text bomb": (
        "image_broken",
        lambda rng: (
            png_header(24, 24)
            + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 23)))
            + chunk(b"IEND", b"")
        ),
    ),
    "a pixel bomb": ("image_too_large", lambda rng: png_of(50_000, 50_000, b"")),
    "a smaller pixel bomb": ("image_too_large", lambda rng: png_of(9_000, 9_000, b"")),
    "a gif bomb": ("image_too_large", lambda rng: b"GIF89a\xff\xff\xff\xff" + saved(drawn(rng), "GIF")[10:]),
    "no width": ("image_zero_size", lambda rng: png_of(0, 24, b"")),
    "no height": ("image_zero_size", lambda rng: b"GIF89a" + struct.pack("<HH", 24, 0) + bytes(20)),
    "an animated gif": ("image_animated", lambda rng: animated(rng, "GIF")),
    "an animated png": ("image_animated", lambda rng: animated(rng, "PNG")),
    "an animated webp": ("image_animated", lambda rng: animated(rng, "WEBP")),
    "a tiff of three pages": ("image_animated", lambda rng: animated(rng, "TIFF")),
    "cmyk": ("image_cmyk", lambda rng: saved(drawn(rng), "JPEG", "CMYK")),
    "16 bits of gray": ("image_16bit", deep),
    "16 bits of color": ("image_16bit", lambda rng: png_of(8, 8, bytes(8 * 49), depth=16)),
    "lab": ("image_colour_space", lambda rng: saved(drawn(rng), "TIFF", "LAB")),
    "all transparent": ("image_transparent", lambda rng: saved(np.zeros((24, 24, 4), np.uint8), mode="RGBA")),
}
"""Hostile images by name: the cause, and a function that makes one."""

BLACK = saved(np.zeros((24, 24, 3), np.uint8))
CELLS: dict[str, tuple[str, dict]] = {
    "nan label": ("label_nan", {"label_0": math.nan, "label_1": 1.0}),
    "labels over one": ("label_sum", {"label_0": 1.0, "label_1": 0.5}),
    "a negative label": ("label_sum", {"label_0": 2.0, "label_1": -1.0}),
    "an infinite label": ("label_sum", {"label_0": math.inf, "label_1": 0.0}),
    "no caption": ("caption_missing", {"caption": None}),
    "an empty caption": ("caption_missing", {"caption": ""}),
    "a blank caption": ("caption_missing", {"caption": " \n\t "}),
    "a caption of a megabyte": ("caption_too_long", {"caption": "long " * 200_000}),
    "a null byte in the caption": ("caption_null_byte", {"caption": "a red\0circle"}),
    "a null byte in a uid": ("uid_null_byte", {"image_0_uid": "a\0b"}),
    "a uid of a megabyte": ("uid_too_long", {"image_1_uid": "u" * 1_000_000}),
    "a null label": ("missing", {"label_0": None}),
    "a null label and no caption": ("missing", {"label_1": None, "caption": None}),
    "has_label false": ("missing", {"has_label": False}),
    "equal labels": ("tie", {"label_0": 0.5, "label_1": 0.5}),
    "one image twice": (
        "tie",
        {"image_0_uid": "same", "image_1_uid": "same", **dict.fromkeys(("jpg_0", "jpg_1"), BLACK)},
    ),
}
"""Hostile or undecided cells by name: the outcome, and the cells that replace those of a good row."""

ODD: tuple[tuple[str, str, dict], ...] = (
    ("PNG", "L", {}),
    ("PNG", "P", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "1", {}),
    ("JPEG", "L", {}),
    ("GIF", "P", {}),
    ("WEBP", "RGBA", {}),
    ("BMP", "RGB", {}),
    ("TIFF", "RGB", {}),
)
"""Unusual kinds and modes that are usable: kind, mode, options of the writer."""


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def hostile_rows(count: int, seed: int = 0) -> Iterator[tuple[dict, str]]:
    """Rows and their expected outcome: "" (good, every third), "tie", "missing", or the cause if bad."""
    rng = np.random.default_rng(seed)
    kinds = [*(("image", name) for name in IMAGES), *(("cells", name) for name in CELLS)]
    for number in range(count):
        row = _good(number, seed, rng)
        if number % 3 == 0:
            yield row, ""
            continue
        what, name = kinds[rng.integers(len(kinds))]
        if what == "cells":
            end, changes = CELLS[name]
            yield row | changes, end
        else:
            end, make = IMAGES[name]
            yield row | {f"jpg_{rng.integers(2)}": make(rng)}, end


def _good(number: int, seed: int, rng: np.random.Generator) -> dict:
    kind, mode, options = ODD[number % len(ODD)]
    first = float(rng.random() < 0.5)
    return {
        "jpg_0": saved(drawn(rng), kind, mode, **options),
        "jpg_1": saved(drawn(rng), "JPEG"),
        "label_0": first,
        "label_1": 1 - first,
        "caption": f"caption {number} ü 🙂",
        "image_0_uid": f"{seed}-{number}-0",
        "image_1_uid": f"{seed}-{number}-1",
        "has_label": True,
    }
