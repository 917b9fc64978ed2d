"""From a unit's rows to pixels of one size, on the CPU. Imports no torch: its workers start fast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from services.ingest.plan import Block
from services.pairs import Row
from services.pictures import BadPicture, decode
from services.sources import Source, Unit


def read_pictures(work: dict[str, Any], source: Source, size: int, flip: bool) -> Iterator[dict[str, Any]]:
    """The pictures that stand first in a unit's blocks, decoded: one row a block.

    Needs ``unit``, ``blocks`` and ``wanted`` (for each block a flag for each slot). Makes ``block`` (its number), ``pixels``
    (uint8 [n size size 3] as bytes), ``about`` (JSON: uid, sha256, size, crop of each picture) and ``bad`` (JSON: by
    its slot in the block, the cause why a picture cannot be used). In memory are one block's pixels and one picture's file.
    """
    unit: Unit = work["unit"]
    blocks: list[Block] = work["blocks"]
    position = blocks[0].start
    rows = source.rows(unit, pictures=True, start=position, stop=blocks[-1].stop)
    for block, wanted in zip(blocks, work["wanted"], strict=True):
        _skip(rows, block.start - position)  # a block between that is there already
        yield {"block": block.number, **_decoded(source, islice(rows, block.stop - block.start), wanted, size, flip)}
        position = block.stop


def _skip(rows: Iterator[Row], count: int) -> None:
    for _ in islice(rows, count):
        pass


def _decoded(source: Source, rows: Iterator[Row], wanted: bytes, size: int, flip: bool) -> dict[str, Any]:
    pixels, about, bad = bytearray(), [], {}
    decided = (row for row in rows if row.kind == "decided")
    for slot, (uid, cell) in enumerate(each for row in decided for each in zip(row.uids, row.pictures, strict=True)):
        if not wanted[slot]:
            continue
        data = source.load(cell)
        try:
            picture = decode(data, size, flip)
        except BadPicture as error:
            bad[slot] = error.cause
        else:
            pixels += np.ascontiguousarray(picture.pixels).data
            about.append([uid, hashlib.sha256(data or b"").hexdigest(), picture.size, picture.crop])
    return {"pixels": bytes(pixels), "about": json.dumps(about), "bad": json.dumps(bad)}
