"""Local copies of latent shards: one uncompressed Arrow file a shard, of which rows are taken through a memory map.

    {folder}/{sha256 of the shard}.arrow    renamed when on the disk, so whole; marked as used by its time of modification
    {folder}/part                           the one that is being written
    {folder}/{two hex digits}.lock          held while a shard is fetched whose sha256 begins with them
    {folder}/room.lock                      held while room is made and used

All readers of a machine share the folder: a shard is fetched once for all of them, and the files are never more than
``max_bytes`` together, the least recently used ones going first. A file that somebody deleted is fetched again. A map lasts for
one read, so that the pages of a file count as the system's cache and not as the process's memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from pyarrow import fs

from dde_core.errors import DataError
from dde_core.latents.schema import Shard

CACHE_BYTES = 20_000_000_000
ATTEMPTS = 5
ARROW_BYTES_BESIDE = 4096
"""Of a file, beside its rows: at most this for the schema."""


class ShardCache:
    """The shards of the dataset at ``path``; ``folder`` is made where there is none, and is in the system's place for
    temporary files by default."""

    def __init__(
        self,
        filesystem: fs.FileSystem,
        path: str,
        shards: Sequence[Shard],
        folder: Path | None = None,
        max_bytes: int = CACHE_BYTES,
    ) -> None:
        self._filesystem, self._path, self._shards, self._max_bytes = filesystem, path, shards, max_bytes
        self._folder = folder or Path(tempfile.gettempdir()) / "dde-latents"
        self._kept: frozenset[str] = frozenset()
        self._one_at_a_time = threading.Lock()  # however many threads: the memory of one shard
        self._closed = False

    def close(self) -> None:
        """Fetch nothing any more."""
        self._closed = True

    def keep(self, numbers: Iterable[int]) -> None:
        """From now on these shards go last when room is made; those of the last call no longer do."""
        self._kept = frozenset(self._local(number).name for number in numbers)

    def take(self, number: int, places: Int[np.ndarray, " b"]) -> pa.RecordBatch:
        """These rows of a shard, in memory. Raises DataError where the shard is not what the manifest says."""
        local = self._local(number)
        for _ in range(ATTEMPTS):
            try:
                self.fetch(number)
                with pa.memory_map(str(local)) as source:
                    return pa.ipc.open_file(source).get_batch(0).take(pa.array(places))
            except FileNotFoundError:  # another process made room
                continue
            except pa.ArrowInvalid:  # torn by somebody or by the disk
                local.unlink(missing_ok=True)
        raise DataError(
            f"shard {self._shards[number].name!r} does not stay readable in {str(self._folder)!r}"
        )

    def fetch(self, number: int) -> None:
        """Make sure that there is a local copy, and mark it as used. Raises RuntimeError after ``close``."""
        shard, local = self._shards[number], self._local(number)
        if self._closed:
            raise RuntimeError(f"the cache is closed, shard {shard.name} is asked for")
        if self._mark(local):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._one_at_a_time, self._locked(shard.sha256[:2]):
            if self._mark(local):  # another thread or process was first
                return
            rows = self._download(shard)
            with self._locked("room"):
                self._make_room(pa.ipc.get_record_batch_size(rows) + ARROW_BYTES_BESIDE)
                self._write(rows, local)

    def _local(self, number: int) -> Path:
        return self._folder / f"{self._shards[number].sha256}.arrow"

    @staticmethod
    def _mark(local: Path) -> bool:
        try:
            os.utime(local)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Alone among all processes. The system lets go of the locks of one that died."""
        with (self._folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _download(self, shard: Shard) -> pa.RecordBatch:
        path = f"{self._path}/{shard.name}"
        try:
            with self._filesystem.open_input_stream(path) as stream:
                data = stream.read_buffer()
        except FileNotFoundError as error:
            raise DataError(f"shard {path!r} is missing, the manifest names it") from error
        if (found := hashlib.sha256(data).hexdigest()) != shard.sha256:
            raise DataError(f"shard {path!r} has sha256 {found}, the manifest says {shard.sha256}")
        # On this thread alone: threads of Arrow's that let go of the data while the process ends would abort it.
        table = (
            pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False).combine_chunks()
        )
        if len(table) != shard.rows:
            raise DataError(f"shard {path!r} has {len(table)} rows, the manifest says {shard.rows}")
        return table.to_batches()[0]

    def _make_room(self, num_bytes: int) -> None:
        files = [(path.name in self._kept, path.stat(), path) for path in self._folder.glob("*.arrow")]
        total = num_bytes + sum(stat.st_size for _, stat, _ in files)
        for _, stat, path in sorted(files, key=lambda file: (file[0], file[1].st_mtime_ns)):
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size

    def _write(self, rows: pa.RecordBatch, local: Path) -> None:
        part = self._folder / "part"
        try:
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
                writer.write(rows)
            with part.open("rb") as written:
                os.fsync(written.fileno())
            part.rename(local)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(error.errno, f"a latent shard cannot be kept: {error}", str(local)) from error
