"""Decode the images of a unit's rows to pixels of one size, on the CPU. Without torch: workers start fast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from services.ingest.plan import Block
from services.pairs.columnar import Unit
from services.pairs.images import BadImage, decode
from services.pairs.row import Row
from services.pairs.source import Source
from services.storage import sources

LOAD_THREADS = 8
"""Images in files of their own are fetched this many at a time."""


def read_images(work: dict[str, Any], source: Source, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Decode the images that occur first in these blocks of a unit. Yields one row for each block.

    In: ``unit``, ``blocks`` and ``wanted`` (for each block a flag for each slot). Out: ``block`` (its
    number), ``pixels`` (uint8 [n size size 3] as bytes), ``metadata`` (JSON: [uid, sha256, size, crop,
    transparent] of each image) and ``bad`` (JSON: slot in the block -> why its image cannot be used).
    ``settings`` are the dataset's. Memory holds the pixels of one block and LOAD_THREADS image files.
    """
    unit: Unit = work["unit"]
    blocks: list[Block] = work["blocks"]
    position = blocks[0].start
    rows = source.rows(unit, with_images=True, start=position, stop=blocks[-1].stop)
    for block, wanted in zip(blocks, work["wanted"], strict=True):
        _skip(rows, block.start - position)  # the rows of a committed block in between
        block_rows = islice(rows, block.stop - block.start)
        yield {"block": block.number, **_decoded(source, block_rows, wanted, settings)}
        position = block.stop


def _skip(rows: Iterator[Row], count: int) -> None:
    for _ in islice(rows, count):
        pass


def _decoded(source: Source, rows: Iterator[Row], wanted: bytes, settings: dict[str, Any]) -> dict[str, Any]:
    pixels = bytearray()
    metadata: list[Any] = []
    bad: dict[int, str] = {}
    for slot, uid, data in _loaded(source, rows, wanted):
        try:
            if isinstance(data, BadImage):
                raise data
            image = decode(data, settings["resolution"], settings["flip"] == "all", settings["background"])
        except BadImage as error:
            bad[slot] = error.cause
        else:
            pixels += np.ascontiguousarray(image.pixels).data
            sha256 = hashlib.sha256(data or b"").hexdigest()
            metadata.append([uid, sha256, image.size, image.crop, image.transparent])
    return {"pixels": bytes(pixels), "metadata": json.dumps(metadata), "bad": json.dumps(bad)}


def _loaded(
    source: Source, rows: Iterator[Row], wanted: bytes
) -> Iterator[tuple[int, str, bytes | BadImage | None]]:
    """(slot, uid, file or why it cannot be loaded) of the wanted images, LOAD_THREADS at a time."""
    decided = (row for row in rows if row.kind == "decided")
    slots = (uid_and_image for row in decided for uid_and_image in zip(row.uids, row.images, strict=True))
    chosen = ((slot, uid, image) for slot, (uid, image) in enumerate(slots) if wanted[slot])
    while group := list(islice(chosen, LOAD_THREADS)):
        images = (image for *_, image in group)
        with sources.in_threads(partial(load, source), images, LOAD_THREADS) as loaded:
            yield from ((slot, uid, data) for (slot, uid, _), data in zip(group, loaded, strict=True))


def load(source: Source, image: bytes | str | None) -> bytes | BadImage | None:
    """The contents of an image of a row, or why they cannot be had."""
    try:
        return source.load(image)
    except BadImage as error:
        return error
