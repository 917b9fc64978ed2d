"""Read latent shards in an order that is a function of (seed, step) and the dataset, so a run can stop and go on anywhere.

Batch s of B pairs is visits s B .. (s+1) B - 1 of the endless sequence "every pair once in the order of epoch 0,
then in the order of epoch 1, ..." (``order.py``). A pair's n-th visit uses draw n of its noise and timestep. A worker takes
every N-th row of the global batch, so the batch does not depend on the number of workers.

In memory are the rows of this batch and of the next, and a byte for each pair of the dataset. Shards lie in a cache on the
local disk (``cache.py``), where those of the order's next window arrive before they are needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
from pyarrow import fs

from dde_core.errors import ConfigError, DataError
from dde_core.latents.cache import CACHE_BYTES, ShardCache
from dde_core.latents.held_out import dataset_keys, hold_out
from dde_core.latents.order import WINDOW_PAIRS, VisitOrder, Window
from dde_core.latents.rows import LatentRows, Part, take_rows
from dde_core.latents.schema import MANIFEST, Manifest

BYTES_BESIDE = 256
"""Of a row, beside latents and tokens: ids, sizes, crops."""

Asked = tuple[int, int, int, int, int]
"""The arguments of ``LatentReader.batch``."""


class LatentReader:
    """Hands out batches of the dataset at ``path``. A thread reads one batch ahead, one fetches shards; ``close`` ends them.

    All readers of a machine should share ``cache``, a folder that holds at most ``cache_bytes`` of shards.
    ``window_pairs`` is a part of the order.
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

        Raises DataError where there is no manifest or not every shard (what is in a shard is checked when it is fetched);
        ConfigError where no pair is left to train on, or the cache cannot hold a window.
        """
        self.manifest = read_manifest(filesystem, path)
        rows = [shard.rows for shard in self.manifest.shards]
        held_out = np.zeros(sum(rows), bool)
        if held_out_pairs:
            held_out = hold_out(dataset_keys(filesystem, path, self.manifest), held_out_pairs)
        self._order = VisitOrder(rows, held_out, window_pairs)
        if not len(self):
            raise ConfigError(
                "held_out_pairs", held_out_pairs, f"leaves none of {len(held_out)} pairs to train on"
            )
        self._cache = ShardCache(filesystem, path, self.manifest.shards, cache, cache_bytes)
        self._cache_bytes, needed = cache_bytes, self._bytes(min(sum(rows), window_pairs + max(rows)))
        if cache_bytes < needed:
            raise ConfigError(
                "cache_bytes", cache_bytes, f"must be {needed} for a window of {window_pairs} pairs"
            )
        self._batches, self._fetches = (ThreadPoolExecutor(1, name) for name in ("batches", "shards"))
        self._reading = threading.Lock()
        self._next: tuple[Asked, Future[LatentRows]] | None = None
        self._at: tuple[Window, int, int] | None = None
        self._wanted: Iterator[int] = iter(())

    def __len__(self) -> int:
        """The number of pairs in an epoch."""
        return len(self._order)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, after the shard that they are at. Nothing is handed out any more."""
        self._cache.close()
        for threads in (self._batches, self._fetches):
            threads.shutdown(cancel_futures=True)

    def batch(self, seed: int, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> LatentRows:
        """Rank's rows of global batch ``step`` (counted from 0). Those of the next step are read while these are used."""
        asked, following = ((seed, some, batch_size, rank, world_size) for some in (step, step + 1))
        ahead, self._next = (
            self._next,
            None,
        )  # an error is raised once: whoever asks again has the rows read again
        if ahead and ahead[0] == asked:
            rows = ahead[1].result()
        else:
            if ahead:
                ahead[1].cancel()
            rows = self._batches.submit(self._read, *asked).result()
        self._next = following, self._batches.submit(self._read, *following)
        return rows

    def held_out(self, rank: int = 0, world_size: int = 1) -> LatentRows:
        """Rank's rows of the pairs that are in no batch."""
        shards, places = self._order.held_out[:, rank::world_size]
        positions = np.arange(rank, self.num_held_out, world_size)
        return self._rows(positions, np.zeros_like(positions), [(np.arange(len(positions)), shards, places)])

    @property
    def num_held_out(self) -> int:
        """The number of pairs that are in no batch."""
        return self._order.held_out.shape[1]

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
            self._turn_to(window, rank, world_size)
            yield rows, shards, places

    def _turn_to(self, window: Window, rank: int, world_size: int) -> None:
        """Have the shards of this window and the next kept and fetched, as far as there is room. Each rank starts elsewhere."""
        if self._at == (window, rank, world_size):
            return
        self._at = window, rank, world_size
        numbers = [
            np.roll(some.shards, -len(some.shards) * rank // world_size)
            for some in (window, self._order.after(window))
        ]
        wanted = list(dict.fromkeys(np.concatenate(numbers).tolist()))
        room = accumulate(self._bytes(self.manifest.shards[number].rows) for number in wanted)
        fitting = [number for number, used in zip(wanted, room, strict=True) if used <= self._cache_bytes]
        self._cache.keep(fitting)
        self._wanted = iter(fitting)
        self._fetches.submit(self._fetch, self._wanted)

    def _fetch(self, wanted: Iterator[int]) -> None:
        """One of them, and then the others: no thread goes on when its process ends."""
        if self._wanted is wanted and (number := next(wanted, None)) is not None:
            with self._reading:  # a batch that needs shards goes first
                pass
            with suppress(OSError, DataError):  # raised where a batch needs the shard
                self._cache.fetch(number)
            self._fetches.submit(self._fetch, wanted)

    def _bytes(self, rows: int) -> int:
        """Of so many rows in the cache, estimated: two sides of float16, int32 tokens."""
        latents, tokens = (
            int(np.prod(self.manifest.latent_shape)),
            self.manifest.num_tokenizers * self.manifest.num_tokens,
        )
        return rows * (4 * latents + 4 * tokens + BYTES_BESIDE)

    def _rows(self, positions: np.ndarray, draws: np.ndarray, parts: Iterable[Part]) -> LatentRows:
        return take_rows(self._cache, self.manifest, positions, draws, parts)


def read_manifest(filesystem: fs.FileSystem, path: str) -> Manifest:
    """The manifest of a dataset all of whose shards are there."""
    try:
        with filesystem.open_input_stream(f"{path}/{MANIFEST}") as stream:
            manifest = Manifest.from_json(stream.read())
    except FileNotFoundError as error:
        raise DataError(f"{path!r} holds no dataset: it has no {MANIFEST}") from error
    there = {info.base_name for info in filesystem.get_file_info(fs.FileSelector(path))}
    if missing := [shard.name for shard in manifest.shards if shard.name not in there]:
        raise DataError(f"{path!r} lacks {len(missing)} shards that its {MANIFEST} names: {missing[0]}")
    return manifest
