"""Encoded blocks in storage, until they are joined into shards: ``blocks/{number}.parquet`` and, beside, ``bad/{number}.json``.

A block is committed once its Parquet file is there. The pictures of it that could not be used were written before that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from services import storage

BLOCKS, BAD = "blocks", "bad"


def commit(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """Write a block. Needs ``block``, ``latents`` (float16 [n c h w] as bytes), ``about`` and ``bad``; makes ``block``,
    ``images`` (how many are in it) and ``bad``."""
    about = json.loads(row["about"])
    if row["bad"] != "{}":
        storage.write_bytes(storage.join(folder, BAD, f"{row['block']:08d}.json"), row["bad"].encode())
    columns = {
        "uid": pa.array([uid for uid, *_ in about], pa.string()),
        "sha256": pa.array([bytes.fromhex(sha256) for _, sha256, *_ in about], pa.binary(32)),
        "size": _fixed(np.array([size for *_, size, _ in about], np.int32), 2),
        "crop": _fixed(np.array([crop for *_, crop in about], np.int32), 2),
        "latents": _fixed(np.frombuffer(row["latents"], np.float16), max(1, len(row["latents"]) // 2 // max(1, len(about)))),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="none", use_dictionary=False, write_statistics=False)
    storage.write_bytes(storage.join(folder, BLOCKS, f"{row['block']:08d}.parquet"), sink.getvalue().to_pybytes())
    return {"block": row["block"], "images": len(about), "bad": row["bad"]}


def _fixed(values: np.ndarray, length: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), length)


def committed_blocks(folder: str) -> set[int]:
    """The numbers of the blocks that are there."""
    return {int(name.removesuffix(".parquet")) for name in storage.list_files(storage.join(folder, BLOCKS))}


def bad_pictures(folder: str, blocks: set[int]) -> Iterator[tuple[int, str]]:
    """(block, JSON as ``commit`` got it) of those of these blocks that have any."""
    for name in storage.list_files(storage.join(folder, BAD)):
        if (number := int(name.removesuffix(".json"))) in blocks:
            yield number, storage.read_bytes(storage.join(folder, BAD, name)).decode()


def read_block(folder: str, number: int, uids: set[str]) -> dict[str, dict[str, Any]]:
    """The committed pictures of a block that are asked for, by uid: ``latents`` float16 [n], ``sha256``, ``size``, ``crop``."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(folder, BLOCKS, f"{number:08d}.parquet"))))
    places = [place for place, uid in enumerate(table["uid"].to_pylist()) if uid in uids]
    latents = table["latents"].combine_chunks().flatten().to_numpy().reshape(len(table), -1) if len(table) else []
    rows = table.drop_columns(["latents"]).take(places).to_pylist()
    return {row["uid"]: {**row, "latents": latents[place].copy()} for place, row in zip(places, rows, strict=True)}


def clear(folder: str) -> None:
    """Drop the blocks once the shards that hold them are there."""
    for name in (BLOCKS, BAD):
        storage.delete_folder(storage.join(folder, name))
