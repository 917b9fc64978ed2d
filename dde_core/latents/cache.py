"""Local copies of latent shards: one uncompressed Arrow file each, read through a memory map.

All readers of a node share them (dde_core/node_cache.py). A deleted or damaged file is fetched again.
A map lasts for one read: the pages of a file count as the system's cache, not as the process's memory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from pyarrow import fs

from dde_core.errors import DataError
from dde_core.latents.schema import Shard
from dde_core.node_cache import NodeCache

CACHE_BYTES = 20_000_000_000
ATTEMPTS = 5
ARROW_BYTES_BESIDE = 4096
"""Of a file, beside its rows: at most this for the schema."""


class ShardCache:
    """Shards of the dataset at ``path``. ``folder`` defaults to one among the system's temporary files."""

    def __init__(
        self,
        filesystem: fs.FileSystem,
        path: str,
        shards: Sequence[Shard],
        folder: Path | None = None,
        max_bytes: int = CACHE_BYTES,
    ) -> None:
        self._filesystem = filesystem
        self._path = path
        self._shards = shards
        self._cache = NodeCache(folder or Path(tempfile.gettempdir()) / "dde-latents", max_bytes)
        self._closed = False

    def close(self) -> None:
        """Fetch no more."""
        self._closed = True

    def prefer(self, numbers: Iterable[int]) -> None:
        """Evict these shards last, in place of those of the previous call."""
        self._cache.prefer(self._name(number) for number in numbers)

    def take(self, number: int, places: Int[np.ndarray, " b"]) -> pa.RecordBatch:
        """Rows of a shard, in memory. Raises DataError where the shard is not what the manifest says."""
        for _ in range(ATTEMPTS):
            with self._hold(number) as local:
                try:
                    with pa.memory_map(str(local)) as source:
                        return pa.ipc.open_file(source).get_batch(0).take(pa.array(places))
                except FileNotFoundError:  # somebody deleted it
                    continue
                except pa.ArrowInvalid:  # damaged by somebody or by the disk
                    local.unlink(missing_ok=True)
        shard = self._shards[number].name
        raise DataError(f"shard {shard!r} cannot be read from the cache {str(self._cache.folder)!r}")

    def fetch(self, number: int) -> None:
        """Make sure that there is a local copy, and mark it as used. Raises RuntimeError after ``close``."""
        with self._hold(number):
            pass

    def _hold(self, number: int) -> AbstractContextManager[Path]:
        if self._closed:
            raise RuntimeError(f"shard {self._shards[number].name} is requested from a closed cache")
        return self._cache.hold(self._name(number), partial(self._prepare, self._shards[number]))

    def _name(self, number: int) -> str:
        return f"{self._shards[number].sha256}.arrow"

    def _prepare(self, shard: Shard) -> tuple[int, Callable[[Path], None]]:
        rows = self._download(shard)
        return pa.ipc.get_record_batch_size(rows) + ARROW_BYTES_BESIDE, partial(_write, rows)

    def _download(self, shard: Shard) -> pa.RecordBatch:
        path = f"{self._path}/{shard.name}"
        try:
            with self._filesystem.open_input_stream(path) as stream:
                data = stream.read_buffer()
        except FileNotFoundError as error:
            raise DataError(f"shard {path!r} is missing, the manifest names it") from error
        if (found := hashlib.sha256(data).hexdigest()) != shard.sha256:
            raise DataError(f"shard {path!r} has sha256 {found}, the manifest says {shard.sha256}")
        # On this thread alone: an Arrow thread that releases the data while the process ends would abort it.
        table = (
            pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False).combine_chunks()
        )
        if len(table) != shard.rows:
            raise DataError(f"shard {path!r} has {len(table)} rows, the manifest says {shard.rows}")
        return table.to_batches()[0]


def _write(rows: pa.RecordBatch, path: Path) -> None:
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write(rows)
        with path.open("rb") as written:
            os.fsync(written.fileno())
    except OSError as error:
        message = f"the cache cannot store a latent shard: {error}"
        raise OSError(error.errno, message, str(path)) from error
