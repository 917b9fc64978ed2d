"""A small dataset of latent shards, and a filesystem that records what is read from it."""

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
    """Write a dataset whose shards have ``sizes`` rows; return its folder.

    Pair i is named pair-i. Its winner's latents are all i, its loser's -i, in float16. Its caption has
    number i, or i modulo ``captions`` if that is not 0.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)

    schema = shard_schema(shape, 2, TOKENS)
    starts = np.cumsum([0, *sizes])
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
    """Columns for ``shard_table``: the pairs with these numbers."""
    caption = numbers % captions if captions else numbers
    found = {"pair_id": [f"pair-{i}" for i in numbers], "label": np.ones(len(numbers))}
    found |= {name: np.tile((caption + k)[:, None], TOKENS) for k, name in enumerate(token_columns(2))}
    for sign, side in ((1, "w"), (-1, "l")):
        found[f"uid_{side}"] = [f"{i}{side}" for i in numbers]
        found[f"latents_{side}"] = np.tile(sign * numbers[:, None], int(np.prod(shape)))
        found[f"size_{side}"] = np.stack([numbers, numbers + 1], axis=1)
        found[f"crop_{side}"] = np.stack([numbers + 2, numbers + 3], axis=1)
    return found


class RecordingFiles(fs.FSSpecHandler):
    """The local files. Reading a whole shard first takes ``delay_s`` and waits until ``gate`` is set.

    ``read`` lists the files that were read as a whole, ``opened`` those that were opened for partial reads.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__(LocalFileSystem())
        self.delay_s = delay_s
        self.read: list[str] = []
        self.opened: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def open_input_stream(self, path: str) -> NativeFile:
        if path.endswith(".parquet"):
            time.sleep(self.delay_s)
            self.gate.wait()
        with self._lock:
            self.read.append(Path(path).name)
        return super().open_input_stream(path)

    def open_input_file(self, path: str) -> NativeFile:
        with self._lock:
            self.opened.append(Path(path).name)
        return super().open_input_file(path)
