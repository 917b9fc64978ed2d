"""Any number of pairs of rendered scenes. They are written as they are made, so a file may exceed memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dde_core.shapes.scenes import all_scenes, caption, render

SCHEMA = pa.schema(
    [
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("caption", pa.string()),
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
    ]
)


def synthetic_rows(count: int, seed: int = 0, size: int = 32, shared: float = 0.25) -> Iterator[dict]:
    """Pairs of two scenes; the first is preferred in half of them.

    A fraction ``shared`` of the rows takes its second image from an earlier row, as comparisons of one
    prompt do. A little noise makes every other image unique.
    """
    rng, scenes = np.random.default_rng(seed), all_scenes()
    earlier: list[tuple[str, bytes]] = []
    for number in range(count):
        images = [_image(scenes[i], rng, size) for i in rng.integers(len(scenes), size=2)]
        uids = [f"{seed}-{number}-0", f"{seed}-{number}-1"]
        if earlier and rng.random() < shared:
            uids[1], images[1] = earlier[rng.integers(len(earlier))]
        earlier = [*earlier[-200:], (uids[0], images[0])]
        label = float(rng.random() < 0.5)
        yield {
            "jpg_0": images[0],
            "jpg_1": images[1],
            "label_0": label,
            "label_1": 1 - label,
            "caption": caption(scenes[rng.integers(len(scenes))]),
            "image_0_uid": uids[0],
            "image_1_uid": uids[1],
        }


def _image(scene, rng: np.random.Generator, size: int) -> bytes:
    pixels = np.clip(render(scene).astype(np.int16) + rng.integers(-4, 5, (32, 32, 3)), 0, 255).astype(
        np.uint8
    )
    image, out = Image.fromarray(pixels), io.BytesIO()
    (image if size == 32 else image.resize((size, size), Image.Resampling.BICUBIC)).save(
        out, "JPEG", quality=90
    )
    return out.getvalue()


def write_stream(path: Path, rows: Iterable[dict], row_group_size: int = 500) -> Path:
    """Write a Parquet file, one row group at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remaining = iter(rows)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        while group := list(islice(remaining, row_group_size)):
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))
    return path
