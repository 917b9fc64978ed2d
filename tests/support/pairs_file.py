"""Small Pick-a-Pic files for tests: drawn scenes, labelled by the annotator's taste."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dde_core.shapes.scenes import all_scenes, caption, leave_unsaid, render


def png(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def pair_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows whose winner shows the caption and whose loser shows another scene; every tenth is a tie."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        right, wrong = (all_scenes()[i] for i in rng.integers(len(all_scenes()), size=2))
        first = bool(rng.random() < 0.5)
        pictures = [png(render(scene, rng)) for scene in ((right, wrong) if first else (wrong, right))]
        label = 0.5 if number % 10 == 9 else float(first)
        rows.append(
            {
                "jpg_0": pictures[0],
                "jpg_1": pictures[1],
                "label_0": label,
                "label_1": 1 - label,
                "caption": caption(leave_unsaid(right, rng)),
                "image_0_uid": f"{seed}-{number}-0",
                "image_1_uid": f"{seed}-{number}-1",
            }
        )
    return rows


def write_pairs(path: Path, rows: list[dict], row_group_size: int = 50) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path
