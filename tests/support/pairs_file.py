"""Small Pick-a-Pic files: rendered scenes, of which the one that matches the caption wins."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dde_core.shapes.scenes import all_scenes, caption, omit_attributes, render


def png(image: np.ndarray) -> bytes:
    """An image uint8 [h w 3] as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def pair_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows whose winner shows the caption and whose loser shows another scene; every tenth is a tie."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        right, wrong = (all_scenes()[i] for i in rng.integers(len(all_scenes()), size=2))
        first = bool(rng.random() < 0.5)
        images = [png(render(scene, rng)) for scene in ((right, wrong) if first else (wrong, right))]
        label = 0.5 if number % 10 == 9 else float(first)
        rows.append(
            {
                "jpg_0": images[0],
                "jpg_1": images[1],
                "label_0": label,
                "label_1": 1 - label,
                "caption": caption(omit_attributes(right, rng)),
                "image_0_uid": f"{seed}-{number}-0",
                "image_1_uid": f"{seed}-{number}-1",
            }
        )
    return rows


def write_pairs(path: Path, rows: list[dict], row_group_size: int = 50) -> Path:
    """Write the rows as a Parquet file; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path
