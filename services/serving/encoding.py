"""Pixels as files: PNG, JPEG or WebP."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from dde_core.engine.contract import Pixels
from services.api.images import OutputFormat
from services.pairs.images import to_png

PNG_LEVEL = 1
"""zlib's; higher levels take longer and make files little smaller."""
LOSSLESS_WEBP = {"lossless": True, "quality": 20, "method": 1}
"""Here ``quality`` is the encoder's effort. Pillow's own takes 40 times as long and saves little."""
TEXT_KEYWORD = "dde"
"""The keyword of the PNG text chunk (iTXt): JSON with what determines the image."""


def encode(
    pixels: Pixels, output_format: OutputFormat, quality: int, text: Mapping[str, Any] | None = None
) -> bytes:
    """The image as a file. ``quality`` is from 0 to 100; at 100 WebP is lossless. PNG ignores it.

    ``text`` becomes a text chunk of a PNG file; the other formats have no metadata.
    """
    if output_format == "png":
        chunk = None if text is None else {TEXT_KEYWORD: json.dumps(text, ensure_ascii=False)}
        return to_png(pixels, PNG_LEVEL, chunk)
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    if output_format == "jpeg":
        image.save(out, "JPEG", quality=max(1, quality), subsampling="4:4:4")
    else:
        image.save(out, "WEBP", **(LOSSLESS_WEBP if quality == 100 else {"quality": quality}))
    return out.getvalue()
