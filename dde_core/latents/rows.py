"""Rows of latent shards in memory, as arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from dde_core.latents.cache import ShardCache
from dde_core.latents.schema import Manifest, token_columns

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Some of the rows: which, in which shards, at which places."""


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


def take_rows(
    cache: ShardCache, manifest: Manifest, positions: np.ndarray, draws: np.ndarray, parts: Iterable[Part]
) -> LatentRows:
    """Read rows from the local copies of their shards, one shard after another."""
    shards, places = np.empty_like(positions), np.empty_like(positions)
    arrays = _arrays(len(positions), manifest)
    for rows, in_shards, at_places in parts:
        shards[rows], places[rows] = in_shards, at_places
        for shard in dict.fromkeys(
            in_shards.tolist()
        ):  # workers meet them in different orders, and fetch for one another
            here = rows[in_shards == shard]
            _fill(arrays, here, cache.take(shard, places[here]), manifest)
    pair_ids = tuple(arrays.pop("pair_ids").tolist())
    return LatentRows(
        positions=positions, draws=draws, shards=shards, places=places, pair_ids=pair_ids, **arrays
    )


def _arrays(num_rows: int, manifest: Manifest) -> dict[str, np.ndarray]:
    arrays = {"pair_ids": np.empty(num_rows, object)}
    arrays["token_ids"] = np.empty((num_rows, manifest.num_tokenizers, manifest.num_tokens), np.int32)
    for side in "wl":
        arrays[f"latents_{side}"] = np.empty((num_rows, *manifest.latent_shape), np.float16)
        arrays |= {f"{name}_{side}": np.empty((num_rows, 2), np.int32) for name in ("sizes", "crops")}
    return arrays


def _fill(arrays: dict[str, np.ndarray], here: np.ndarray, rows: pa.RecordBatch, manifest: Manifest) -> None:
    arrays["pair_ids"][here] = rows["pair_id"].to_numpy(zero_copy_only=False)
    for k, column in enumerate(token_columns(manifest.num_tokenizers)):
        arrays["token_ids"][here, k] = _array(rows[column])
    for side in "wl":
        for name, column in (("sizes", "size"), ("crops", "crop")):
            arrays[f"{name}_{side}"][here] = _array(rows[f"{column}_{side}"])
        arrays[f"latents_{side}"][here] = _array(rows[f"latents_{side}"]).reshape(-1, *manifest.latent_shape)


def _array(column: pa.FixedSizeListArray) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
