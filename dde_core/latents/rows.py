"""Rows of latent shards in memory, as arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from dde_core.latents.cache import ShardCache
from dde_core.latents.schema import Manifest, token_columns

Part = tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Int[np.ndarray, " m"]]
"""Some of the rows: their indices, their shards, and their places in these."""


@dataclass(frozen=True, eq=False)
class LatentRows:
    """A worker's b rows. ``positions`` are their indices among all workers' rows, ``draws`` the numbers of
    their visits.

    ``shards`` and ``places`` locate a row in the dataset: the shard's number in the manifest, and the row in
    the shard. ``labels`` are the winners' shares of the preference. ``sizes_*`` are the original (height,
    width), ``crops_*`` the crop's (top, left), in pixels.
    """

    positions: Int[np.ndarray, " b"]
    draws: Int[np.ndarray, " b"]
    shards: Int[np.ndarray, " b"]
    places: Int[np.ndarray, " b"]
    pair_ids: tuple[str, ...]
    labels: Float[np.ndarray, " b"]
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
        """The same rows at visit ``number``."""
        return replace(self, draws=np.full(len(self), number))


def take_rows(
    cache: ShardCache, manifest: Manifest, positions: np.ndarray, draws: np.ndarray, parts: Iterable[Part]
) -> LatentRows:
    """Read rows from the local copies of their shards, shard by shard.

    Shards are read in the order of the rows, which differs between workers: so workers fetch different shards
    first.
    """
    shards = np.empty_like(positions)
    places = np.empty_like(positions)
    arrays = _allocate(len(positions), manifest)
    for rows, shards_of_rows, places_of_rows in parts:
        shards[rows] = shards_of_rows
        places[rows] = places_of_rows
        for shard in dict.fromkeys(shards_of_rows.tolist()):
            in_shard = rows[shards_of_rows == shard]
            _fill(arrays, in_shard, cache.take(shard, places[in_shard]), manifest)
    pair_ids = tuple(arrays.pop("pair_ids").tolist())
    return LatentRows(
        positions=positions, draws=draws, shards=shards, places=places, pair_ids=pair_ids, **arrays
    )


def _allocate(num_rows: int, manifest: Manifest) -> dict[str, np.ndarray]:
    """Empty arrays for the fields of LatentRows that come from shards."""
    arrays = {
        "pair_ids": np.empty(num_rows, object),
        "labels": np.empty(num_rows, np.float32),
        "token_ids": np.empty((num_rows, manifest.num_tokenizers, manifest.num_tokens), np.int32),
    }
    for side in "wl":
        arrays[f"latents_{side}"] = np.empty((num_rows, *manifest.latent_shape), np.float16)
        arrays[f"sizes_{side}"] = np.empty((num_rows, 2), np.int32)
        arrays[f"crops_{side}"] = np.empty((num_rows, 2), np.int32)
    return arrays


def _fill(
    arrays: dict[str, np.ndarray], to: Int[np.ndarray, " m"], rows: pa.RecordBatch, manifest: Manifest
) -> None:
    """Write m rows of a shard into the arrays at the indices ``to``."""
    arrays["pair_ids"][to] = rows["pair_id"].to_numpy(zero_copy_only=False)
    arrays["labels"][to] = rows["label"].to_numpy()
    for k, column in enumerate(token_columns(manifest.num_tokenizers)):
        arrays["token_ids"][to, k] = _array(rows[column])
    for side in "wl":
        arrays[f"sizes_{side}"][to] = _array(rows[f"size_{side}"])
        arrays[f"crops_{side}"][to] = _array(rows[f"crop_{side}"])
        arrays[f"latents_{side}"][to] = _array(rows[f"latents_{side}"]).reshape(-1, *manifest.latent_shape)


def _array(column: pa.FixedSizeListArray) -> np.ndarray:
    """A column of lists as [rows, length]."""
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1)
