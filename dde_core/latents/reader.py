"""Read latent shards in an order that depends on seed, step and dataset alone, so a run can resume at any
step.

Batch s of B pairs is visits s B .. (s+1) B - 1 of the endless sequence "every pair once in the order of epoch
0, then in the order of epoch 1, ..." (``order.py``). A pair's n-th visit uses draw n of its noise and
timestep. Each of N workers takes every N-th row, so the global batch does not depend on the number of
workers.

Memory holds the rows of this batch and of the next, and a byte for each pair of the dataset. Shards are
cached on the local disk (``cache.py``); those of the next window are fetched before they are needed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
from pyarrow import fs

from dde_core.errors import ConfigError, DataError
from dde_core.latents.cache import CACHE_BYTES, ShardCache
from dde_core.latents.held_out import dataset_keys, hold_out
from dde_core.latents.order import WINDOW_PAIRS, VisitOrder, Window
from dde_core.latents.rows import LatentRows, Part, take_rows
from dde_core.latents.schema import MANIFEST, Manifest

BYTES_BESIDE = 256
"""Bytes of a row beside latents and tokens: ids, sizes, crops."""

BatchRequest = tuple[int, int, int, int, int]
"""The arguments of ``LatentReader.batch``."""


class LatentReader:
    """Reads batches of the dataset at ``path``. One thread reads a batch ahead, one fetches shards; ``close``
    ends both.

    All readers of a node should share ``cache``, a folder that holds at most ``cache_bytes`` of shards. The
    order of visits depends on ``window_pairs``.
    """

    def __init__(
        self,
        filesystem: fs.FileSystem,
        path: str,
        held_out_pairs: int = 0,
        *,
        cache: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        window_pairs: int = WINDOW_PAIRS,
    ) -> None:
        """Keep at least ``held_out_pairs`` pairs out of the batches.

        Raises DataError if the manifest or a shard is missing (a shard's content is checked when it is
        fetched), and ConfigError if no pair is left to train on or the cache cannot hold a window.
        """
        self.manifest = read_manifest(filesystem, path)
        rows = [shard.rows for shard in self.manifest.shards]
        held_out = np.zeros(sum(rows), bool)
        if held_out_pairs:
            held_out = hold_out(dataset_keys(filesystem, path, self.manifest), held_out_pairs)
        self._order = VisitOrder(rows, held_out, window_pairs)
        if not len(self):
            reason = f"leaves none of {len(held_out)} pairs to train on"
            raise ConfigError("held_out_pairs", held_out_pairs, reason)
        self._cache = ShardCache(filesystem, path, self.manifest.shards, cache, cache_bytes)
        self._cache_bytes = cache_bytes
        needed = self._bytes(min(sum(rows), window_pairs + max(rows)))
        if cache_bytes < needed:
            reason = f"must be at least {needed} for a window of {window_pairs} pairs"
            raise ConfigError("cache_bytes", cache_bytes, reason)
        self._batches = ThreadPoolExecutor(1, "batches")
        self._fetches = ThreadPoolExecutor(1, "shards")
        self._reading = threading.Lock()
        self._next: tuple[BatchRequest, Future[LatentRows]] | None = None
        self._window: tuple[Window, int, int] | None = None
        self._to_fetch: Iterator[int] = iter(())

    def __len__(self) -> int:
        """The number of pairs in an epoch."""
        return len(self._order)

    def __enter__(self) -> LatentReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads after the shard that they are reading. No batch can be read any more."""
        self._cache.close()
        for threads in (self._batches, self._fetches):
            threads.shutdown(cancel_futures=True)

    def batch(self, seed: int, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> LatentRows:
        """Rank's rows of global batch ``step`` (from 0). The rows of the next step are read in the
        background.

        After an error, the same call reads the rows again.
        """
        request: BatchRequest = (seed, step, batch_size, rank, world_size)
        ahead = self._next
        self._next = None
        if ahead and ahead[0] == request:
            rows = ahead[1].result()
        else:
            if ahead:
                ahead[1].cancel()
            rows = self._batches.submit(self._read, *request).result()
        following: BatchRequest = (seed, step + 1, batch_size, rank, world_size)
        self._next = (following, self._batches.submit(self._read, *following))
        return rows

    def held_out(self, rank: int = 0, world_size: int = 1) -> LatentRows:
        """Rank's rows of the held-out pairs, at visit 0."""
        shards, places = self._order.held_out[:, rank::world_size]
        positions = np.arange(rank, self.num_held_out, world_size)
        return self._rows(positions, np.zeros_like(positions), [(np.arange(len(positions)), shards, places)])

    @property
    def num_held_out(self) -> int:
        """The number of held-out pairs."""
        return int(self._order.held_out.shape[1])

    def shard(self, number: int) -> LatentRows:
        """All rows of one shard, held out or not, in its order, at visit 0."""
        places = np.arange(self.manifest.shards[number].rows)
        return self._rows(places, np.zeros_like(places), [(places, np.full_like(places, number), places)])

    def _read(self, seed: int, step: int, batch_size: int, rank: int, world_size: int) -> LatentRows:
        positions = np.arange(rank, batch_size, world_size)
        visits = step * batch_size + positions
        with self._reading:
            return self._rows(positions, visits // len(self), self._visits(seed, visits, rank, world_size))

    def _visits(self, seed: int, visits: np.ndarray, rank: int, world_size: int) -> Iterator[Part]:
        for window, rows, shards, places in self._order.visits(seed, visits):
            self._enter(window, rank, world_size)
            yield rows, shards, places

    def _enter(self, window: Window, rank: int, world_size: int) -> None:
        """Fetch and keep the shards of this window and the next, as many as fit. Each rank starts with other
        shards."""
        if self._window == (window, rank, world_size):
            return
        self._window = (window, rank, world_size)
        rotated = [
            np.roll(each.shards, -len(each.shards) * rank // world_size)
            for each in (window, self._order.after(window))
        ]
        numbers = list(dict.fromkeys(np.concatenate(rotated).tolist()))
        totals = accumulate(self._bytes(self.manifest.shards[number].rows) for number in numbers)
        fitting = [
            number for number, total in zip(numbers, totals, strict=True) if total <= self._cache_bytes
        ]
        self._cache.prefer(fitting)
        self._to_fetch = iter(fitting)
        self._fetches.submit(self._fetch_next, self._to_fetch)

    def _fetch_next(self, numbers: Iterator[int]) -> None:
        """Fetch one shard and submit the next, so that the thread ends with its process. A newer list
        replaces this one."""
        if self._to_fetch is not numbers:
            return
        number = next(numbers, None)
        if number is None:
            return
        with self._reading:  # a batch that is being read fetches its shards first
            pass
        with suppress(OSError, DataError):  # raised again when a batch needs the shard
            self._cache.fetch(number)
        self._fetches.submit(self._fetch_next, numbers)

    def _bytes(self, rows: int) -> int:
        """Estimated bytes of ``rows`` in the cache: two sides of float16 latents, int32 tokens."""
        latents = math.prod(self.manifest.latent_shape)
        tokens = self.manifest.num_tokenizers * self.manifest.num_tokens
        return rows * (4 * latents + 4 * tokens + BYTES_BESIDE)

    def _rows(self, positions: np.ndarray, draws: np.ndarray, parts: Iterable[Part]) -> LatentRows:
        return take_rows(self._cache, self.manifest, positions, draws, parts)


def read_manifest(filesystem: fs.FileSystem, path: str) -> Manifest:
    """The dataset's manifest. Raises DataError if the manifest or a shard is missing."""
    try:
        with filesystem.open_input_stream(f"{path}/{MANIFEST}") as stream:
            manifest = Manifest.from_json(stream.read())
    except FileNotFoundError as error:
        raise DataError(f"{path!r} holds no dataset: it has no {MANIFEST}") from error
    names = {info.base_name for info in filesystem.get_file_info(fs.FileSelector(path))}
    missing = [shard.name for shard in manifest.shards if shard.name not in names]
    if missing:
        raise DataError(f"{path!r} lacks {len(missing)} shards that its {MANIFEST} names: {missing[0]}")
    return manifest
