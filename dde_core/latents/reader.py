"""Read latent shards in an order that is a function of (seed, step) alone, so a run can stop and go on anywhere.

Batch s of B pairs is positions s B .. (s+1) B - 1 of the endless sequence "every pair once in the order of epoch 0,
then in the order of epoch 1, ...". A pair's n-th visit uses draw n of its noise and timestep. A worker takes every N-th
row of the global batch, so the batch does not depend on the number of workers.

Pairs that are held out are in no batch. They are chosen by their captions, whole captions at a time and the same ones
whatever the run's seed is, so that no caption is on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from pyarrow import fs

from dde_core.errors import ConfigError, DataError
from dde_core.latents.schema import MANIFEST, Manifest, token_columns
from dde_core.noise import permutation


@dataclass(frozen=True, eq=False)
class LatentRows:
    """A worker's part of b rows. ``positions`` are the rows' places among all workers' rows, ``draws`` their visits.

    ``shards`` and ``places`` say where a row stands in the dataset: the shard's number in the manifest, the row in it.
    ``sizes_*`` are original (height, width), ``crops_*`` (top, left) of what was cut of it, in pixels.
    """

    positions: Int[np.ndarray, " b"]
    draws: Int[np.ndarray, " b"]
    shards: Int[np.ndarray, " b"]
    places: Int[np.ndarray, " b"]
    pair_ids: tuple[str, ...]
    token_ids: Int[np.ndarray, "b k s"]
    latents_w: Float[np.ndarray, "b c h w"]
    latents_l: Float[np.ndarray, "b c h w"]
    sizes_w: Int[np.ndarray, "b 2"]
    sizes_l: Int[np.ndarray, "b 2"]
    crops_w: Int[np.ndarray, "b 2"]
    crops_l: Int[np.ndarray, "b 2"]

    def __len__(self) -> int:
        return len(self.pair_ids)

    def rows(self, keep: slice) -> LatentRows:
        """Some of the rows."""
        return LatentRows(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})

    def visit(self, number: int) -> LatentRows:
        """The same rows at their n-th visit."""
        return replace(self, draws=np.full(len(self), number))


class LatentReader:
    """Holds a dataset's shards in memory (a pair of 512 px pictures takes 64 KB) and hands out batches."""

    def __init__(self, filesystem: fs.FileSystem, path: str, held_out_pairs: int = 0) -> None:
        """Keep at least ``held_out_pairs`` pairs out of the batches.

        Raises DataError where there is no manifest, or a shard is not what the manifest says; ConfigError where no pair is
        left to train on.
        """
        try:
            with filesystem.open_input_stream(f"{path}/{MANIFEST}") as stream:
                self.manifest = Manifest.from_json(stream.read())
        except FileNotFoundError as error:
            raise DataError(f"{path!r} holds no dataset: it has no {MANIFEST}") from error
        self._table = pa.concat_tables(self._read(filesystem, f"{path}/{s.name}", s.sha256) for s in self.manifest.shards)
        held_out = np.zeros(len(self._table), bool)
        if held_out_pairs:
            held_out = hold_out([caption.tobytes() for caption in self._tokens(self._table)], held_out_pairs)
        self._trained, self._held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        if not len(self._trained):
            raise ConfigError("held_out_pairs", held_out_pairs, f"leaves none of {len(self._table)} pairs to train on")

    def __len__(self) -> int:
        """The number of pairs in an epoch."""
        return len(self._trained)

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
        rows = np.array([order[e][o] for e, o in zip(epochs, offsets, strict=True)], dtype=np.int64)
        return self._rows(self._trained[rows], places - step * batch_size, epochs)

    def held_out(self, rank: int = 0, world_size: int = 1) -> LatentRows:
        """Rank's rows of the pairs that are in no batch."""
        places = np.arange(rank, len(self._held_out), world_size)
        return self._rows(self._held_out[places], places, np.zeros_like(places))

    @property
    def num_held_out(self) -> int:
        """The number of pairs that are in no batch."""
        return len(self._held_out)

    def _rows(self, chosen: np.ndarray, positions: np.ndarray, draws: np.ndarray) -> LatentRows:
        rows, latent_shape = self._table.take(chosen), self.manifest.latent_shape
        return LatentRows(
            positions=positions,
            draws=draws,
            pair_ids=tuple(rows["pair_id"].to_pylist()),
            token_ids=self._tokens(rows),
            **{f"latents_{side}": self._array(rows, f"latents_{side}", latent_shape) for side in "wl"},
            **{f"sizes_{side}": self._array(rows, f"size_{side}", (2,)) for side in "wl"},
            **{f"crops_{side}": self._array(rows, f"crop_{side}", (2,)) for side in "wl"},
        )

    def _tokens(self, rows: pa.Table) -> np.ndarray:
        names = token_columns(self.manifest.num_tokenizers)
        return np.stack([self._array(rows, name, (self.manifest.num_tokens,)) for name in names], axis=1)

    @staticmethod
    def _array(rows: pa.Table, column: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rows[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(rows), *shape)


def hold_out(captions: Sequence[bytes], num_pairs: int) -> np.ndarray:
    """bool [n]: whole captions in the order of their hashes, until they are at least ``num_pairs`` pairs."""
    keys = np.array([hashlib.sha256(caption).hexdigest() for caption in captions])
    distinct, caption_of, counts = np.unique(keys, return_inverse=True, return_counts=True)
    before = np.cumsum(counts) - counts
    return (before < num_pairs)[caption_of] if len(distinct) else np.zeros(0, bool)
