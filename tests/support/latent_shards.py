"""A small dataset of latent shards, and a filesystem that tells what is read from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from pyarrow import NativeFile, fs

from dde_core.latents.schema import MANIFEST, Manifest, shard_schema, token_columns
from dde_core.latents.writer import shard_table, write_shard

TOKENS = 5


def write_shards(
    folder: Path, sizes: Sequence[int], shape: tuple[int, int, int] = (4, 2, 2), captions: int = 0
) -> Path:
    """Shards of so many rows: pair i is named pair-i, all of its winner's latents are i, its loser's -i (in float16), and
    its caption is number i, or i modulo ``captions``."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)

    schema, starts = shard_schema(shape, 2, TOKENS), np.cumsum([0, *sizes])
    shards = tuple(
        write_shard(n, shard_table(columns(np.arange(start, start + size), shape, captions), schema), write)
        for n, (start, size) in enumerate(zip(starts.tolist(), sizes, strict=False))
    )
    manifest = Manifest(
        digest="d",
        encoder_digest="e",
        settings={},
        latent_shape=shape,
        num_tokenizers=2,
        num_tokens=TOKENS,
        counts={"pairs": sum(sizes)},
        shards=shards,
    )
    write(MANIFEST, manifest.to_json())
    return folder


def columns(numbers: np.ndarray, shape: tuple[int, int, int], captions: int = 0) -> dict:
    """What ``shard_table`` takes."""
    caption = numbers % captions if captions else numbers
    found = {"pair_id": [f"pair-{i}" for i in numbers], "label": np.ones(len(numbers))}
    found |= {name: np.tile((caption + k)[:, None], TOKENS) for k, name in enumerate(token_columns(2))}
    for sign, side in ((1, "w"), (-1, "l")):
        found[f"uid_{side}"] = [f"{i}{side}" for i in numbers]
        found[f"latents_{side}"] = np.tile(sign * numbers[:, None], int(np.prod(shape)))
        found[f"size_{side}"] = np.stack([numbers, numbers + 1], axis=1)
        found[f"crop_{side}"] = np.stack([numbers + 2, numbers + 3], axis=1)
    return found


class Watched(fs.FSSpecHandler):
    """The local files, each shard's after ``delay_s``. ``read`` are the files that were read as a whole, ``looked_into`` those
    that were opened to read parts of them."""

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__(LocalFileSystem())
        self.delay_s, self.read, self.looked_into, self._lock = delay_s, [], [], threading.Lock()

    def open_input_stream(self, path: str) -> NativeFile:
        time.sleep(self.delay_s if path.endswith(".parquet") else 0)
        with self._lock:
            self.read.append(Path(path).name)
        return super().open_input_stream(path)

    def open_input_file(self, path: str) -> NativeFile:
        with self._lock:
            self.looked_into.append(Path(path).name)
        return super().open_input_file(path)
