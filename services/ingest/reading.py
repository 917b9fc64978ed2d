"""From a unit's rows to pixels of one size, on the CPU. Imports no torch: its workers start fast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from services.ingest.plan import Block
from services.pairs.columnar import Unit
from services.pairs.images import BadImage, decode
from services.pairs.row import Row
from services.pairs.source import Source

LOADS_AT_ONCE = 8
"""Images that lie in files of their own are fetched so many at a time."""


def read_images(work: dict[str, Any], source: Source, size: int, flip: bool) -> Iterator[dict[str, Any]]:
    """The images that stand first in a unit's blocks, decoded: one row a block.

    Needs ``unit``, ``blocks`` and ``wanted`` (for each block a flag for each slot). Makes ``block`` (its number), ``pixels``
    (uint8 [n size size 3] as bytes), ``about`` (JSON: uid, sha256, size, crop of each image) and ``bad`` (JSON: by
    its slot in the block, the cause why an image cannot be used). In memory are one block's pixels and a few images' files.
    """
    unit: Unit = work["unit"]
    blocks: list[Block] = work["blocks"]
    position = blocks[0].start
    rows = source.rows(unit, with_images=True, start=position, stop=blocks[-1].stop)
    for block, wanted in zip(blocks, work["wanted"], strict=True):
        _skip(rows, block.start - position)  # a block between that is there already
        yield {
            "block": block.number,
            **_decoded(source, islice(rows, block.stop - block.start), wanted, size, flip),
        }
        position = block.stop


def _skip(rows: Iterator[Row], count: int) -> None:
    for _ in islice(rows, count):
        pass


def _decoded(source: Source, rows: Iterator[Row], wanted: bytes, size: int, flip: bool) -> dict[str, Any]:
    pixels, about, bad = bytearray(), [], {}
    for slot, uid, data in _loaded(source, rows, wanted):
        try:
            if isinstance(data, BadImage):
                raise data
            image = decode(data, size, flip)
        except BadImage as error:
            bad[slot] = error.cause
        else:
            pixels += np.ascontiguousarray(image.pixels).data
            about.append([uid, hashlib.sha256(data or b"").hexdigest(), image.size, image.crop])
    return {"pixels": bytes(pixels), "about": json.dumps(about), "bad": json.dumps(bad)}


def _loaded(
    source: Source, rows: Iterator[Row], wanted: bytes
) -> Iterator[tuple[int, str, bytes | BadImage | None]]:
    """Slot, uid and file of what is wanted, or why there is none; a few files are fetched at a time."""
    slots = (each for row in rows if row.kind == "decided" for each in zip(row.uids, row.images, strict=True))
    chosen = ((slot, uid, cell) for slot, (uid, cell) in enumerate(slots) if wanted[slot])
    with ThreadPoolExecutor(LOADS_AT_ONCE) as pool:
        while some := list(islice(chosen, LOADS_AT_ONCE)):
            files = pool.map(lambda each: _load(source, each[2]), some)
            yield from ((slot, uid, data) for (slot, uid, _), data in zip(some, files, strict=True))


def _load(source: Source, cell: bytes | str | None) -> bytes | BadImage | None:
    try:
        return source.load(cell)
    except BadImage as error:
        return error
