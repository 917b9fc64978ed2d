"""Read latent shards in an order that is a function of (seed, step) alone, so a run can stop and go on anywhere.

Batch s of B pairs is positions s B .. (s+1) B - 1 of the endless sequence "every pair once in the order of epoch 0,
then in the order of epoch 1, ...". A pair's n-th visit uses draw n of its noise and timestep. A worker takes every N-th
row of the global batch, so the batch does not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dde_core.errors import DataError
from dde_core.latents.schema import MANIFEST, Manifest
from dde_core.noise import permutation


@dataclass(frozen=True, eq=False)
class LatentRows:
    """A worker's part of one global batch. ``positions`` are the rows' places in the global batch, ``draws`` their visits."""

    positions: np.ndarray
    draws: np.ndarray
    pair_ids: tuple[str, ...]
    token_ids: np.ndarray
    latents_w: np.ndarray
    latents_l: np.ndarray


class LatentReader:
    """Holds a dataset's shards in memory (a pair of 512 px pictures takes 64 KB) and hands out batches."""

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        """Raises DataError where there is no manifest, or a shard is not what the manifest says."""
        try:
            with filesystem.open_input_stream(f"{path}/{MANIFEST}") as stream:
                self.manifest = Manifest.from_json(stream.read())
        except FileNotFoundError as error:
            raise DataError(f"{path!r} holds no dataset: it has no {MANIFEST}") from error
        self._table = pa.concat_tables(self._read(filesystem, f"{path}/{s.name}", s.sha256) for s in self.manifest.shards)

    def __len__(self) -> int:
        return len(self._table)

    @staticmethod
    def _read(filesystem: fs.FileSystem, path: str, sha256: str) -> pa.Table:
        with filesystem.open_input_stream(path) as stream:
            data = stream.read()
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise DataError(f"shard {path!r} has sha256 {found}, the manifest says {sha256}")
        return pq.read_table(pa.BufferReader(data))

    def batch(self, seed: int, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> LatentRows:
        """Rank's rows of global batch ``step`` (counted from 0)."""
        places = step * batch_size + np.arange(rank, batch_size, world_size)
        epochs, offsets = places // len(self), places % len(self)
        order = {epoch: permutation(seed, int(epoch), len(self)) for epoch in np.unique(epochs)}
        rows = self._table.take(np.array([order[e][o] for e, o in zip(epochs, offsets, strict=True)], dtype=np.int64))
        return LatentRows(
            positions=places - step * batch_size,
            draws=epochs,
            pair_ids=tuple(rows["pair_id"].to_pylist()),
            token_ids=self._array(rows, "token_ids", (self.manifest.num_tokens,)),
            latents_w=self._array(rows, "latents_w", self.manifest.latent_shape),
            latents_l=self._array(rows, "latents_l", self.manifest.latent_shape),
        )

    @staticmethod
    def _array(rows: pa.Table, column: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rows[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(rows), *shape)
