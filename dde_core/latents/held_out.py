"""Which pairs are held out. Whole captions are chosen by their hash, the same ones for every seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int, UInt64
from pyarrow import fs

from dde_core.errors import DataError
from dde_core.latents.schema import Manifest, Shard, token_columns

READERS = 8
"""Shards whose captions are read concurrently: one request to an object store is slow, many are not."""


def hold_out(keys: UInt64[np.ndarray, " n"], num_pairs: int) -> Bool[np.ndarray, " n"]:
    """Mask of the held-out pairs: whole captions in the order of their keys, up to at least ``num_pairs``
    pairs."""
    _, caption_of, counts = np.unique(keys, return_inverse=True, return_counts=True)
    before = np.cumsum(counts) - counts
    return (before < num_pairs)[caption_of]


def held_out_captions(
    captions: Sequence[str], pairs: Int[np.ndarray, " n"], keys: UInt64[np.ndarray, " n"], num_pairs: int
) -> list[str]:
    """The captions that no pair is trained with if ``num_pairs`` are held out: one for each key, by keys.

    ``pairs`` counts the decided pairs of each caption. Pairs that cannot be encoded later change nothing:
    with fewer pairs before it in the order of keys, a held-out caption stays held out.
    """
    is_held_out = hold_out(np.repeat(keys, pairs), num_pairs)[np.cumsum(pairs) - pairs]
    _, first = np.unique(keys, return_index=True)
    return [captions[i] for i in first[is_held_out[first]]]


def caption_keys(tokens: Int[np.ndarray, "n k s"]) -> UInt64[np.ndarray, " n"]:
    """The first 64 bits of sha256 over each caption's tokens. Captions with equal keys are held out
    together."""
    digests = (hashlib.sha256(caption.tobytes()).digest() for caption in tokens)
    return np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64, len(tokens))


def dataset_keys(filesystem: fs.FileSystem, path: str, manifest: Manifest) -> UInt64[np.ndarray, " pairs"]:
    """The caption key of every pair, shard by shard. Only the columns of tokens are read."""

    def keys_of(shard: Shard) -> UInt64[np.ndarray, " rows"]:
        return caption_keys(_tokens(filesystem, f"{path}/{shard.name}", shard.rows, manifest))

    with ThreadPoolExecutor(READERS) as readers:
        return np.concatenate([np.zeros(0, np.uint64), *readers.map(keys_of, manifest.shards)])


def _tokens(filesystem: fs.FileSystem, path: str, rows: int, manifest: Manifest) -> Int[np.ndarray, "n k s"]:
    names = token_columns(manifest.num_tokenizers)
    try:
        with filesystem.open_input_file(path) as file:
            table = pq.ParquetFile(file).read(columns=names, use_threads=False)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(f"shard {path!r} cannot be read: {error}") from error
    if len(table) != rows:
        raise DataError(f"shard {path!r} has {len(table)} rows, the manifest says {rows}")
    columns = [table[name].combine_chunks().flatten().to_numpy().reshape(rows, -1) for name in names]
    return np.stack(columns, axis=1)
