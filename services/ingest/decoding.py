"""From rows of Parquet to pixels of one size, on the CPU. Imports no torch: its workers start fast."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from services import pairs

ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Decoded:
    """``pixels`` uint8 [size, size, 3]; the original (height, width) and the (top, left) of the centre crop, in pixels."""

    pixels: np.ndarray
    size: tuple[int, int]
    crop: tuple[int, int]


def decode(data: bytes | None, size: int) -> Decoded:
    """Decode, cut the centre square, resize. Raises ValueError with the cause for what is no usable picture."""
    try:
        with Image.open(io.BytesIO(data or b"")) as image:
            picture = image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except (OSError, SyntaxError, struct.error, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"broken image: {type(error).__name__}") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    return Decoded(np.asarray(square), (picture.height, picture.width), (top, left))


def decode_unit(units: dict[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Read what is wanted of a row group and decode it, a few rows at a time; what cannot be used carries its cause."""
    for uri, file, group, wanted in zip(units["uri"], units["file"], units["row_group"], units["wanted"], strict=True):
        by_row: dict[int, list[dict]] = {}
        for want in wanted:
            by_row.setdefault(int(want["row"]), []).append(want)
        parquet, start = pairs.open_parquet(str(uri), str(file)), 0
        for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[int(group)], columns=list(pairs.IMAGE_COLUMNS)):
            rows = [row for row in range(start, start + len(batch)) if row in by_row]
            found = [(batch[want["column"]][row - start].as_py(), want["uid"]) for row in rows for want in by_row[row]]
            start += len(batch)
            if found:
                yield _stack([_decode_row(data, uid, size) for data, uid in found])


def _decode_row(data: bytes | None, uid: str, size: int) -> dict[str, Any]:
    row = {"uid": uid, "sha256": hashlib.sha256(data or b"").hexdigest(), "error": ""}
    try:
        picture = decode(data, size)
    except ValueError as error:
        row["error"], picture = str(error), Decoded(np.zeros((size, size, 3), np.uint8), (0, 0), (0, 0))
    return {**row, "pixels": picture.pixels, "size": picture.size, "crop": picture.crop}


def _stack(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
