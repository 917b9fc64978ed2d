"""Encoded blocks in storage, until they are joined into shards: ``blocks/{number}.parquet`` and, beside, ``bad/{number}.json``.

A block is committed once its Parquet file is there. The pictures of it that could not be used were written before that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from services import storage

BLOCKS, BAD = "blocks", "bad"
READS_AT_ONCE = 16


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
    """The numbers of the blocks that are there. What was said of others is dropped: it is said anew when they are encoded."""
    done = set(_numbered(folder, BLOCKS))
    for number, name in _numbered(folder, BAD).items():
        if number not in done:
            storage.delete_file(storage.join(folder, BAD, name))
    return done


def bad_pictures(folder: str, blocks: set[int]) -> Iterator[tuple[int, str]]:
    """(block, JSON as ``commit`` got it) of those of these blocks that have any."""
    names = {number: name for number, name in _numbered(folder, BAD).items() if number in blocks}
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        files = pool.map(lambda name: storage.read_bytes(storage.join(folder, BAD, name)).decode(), names.values())
        yield from zip(names, files, strict=True)


def _numbered(folder: str, kind: str) -> dict[int, str]:
    names = storage.list_files(storage.join(folder, kind))
    return {int(found[1]): name for name in names if (found := re.fullmatch(r"(\d{8,})\.(parquet|json)", name))}


def read_block(folder: str, number: int, uids: set[str]) -> dict[str, dict[str, Any]]:
    """The committed pictures of a block that are asked for, by uid: ``latents`` float16 [n], ``sha256``, ``size``, ``crop``."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(folder, BLOCKS, f"{number:08d}.parquet"))))
    places = [place for place, uid in enumerate(table["uid"].to_pylist()) if uid in uids]
    latents = table["latents"].combine_chunks().flatten().to_numpy().reshape(len(table), -1) if len(table) else []
    rows = table.drop_columns(["latents"]).take(pa.array(places, pa.int64())).to_pylist()
    return {row["uid"]: {**row, "latents": latents[place].copy()} for place, row in zip(places, rows, strict=True)}


def clear(folder: str) -> None:
    """Drop the blocks once the shards that hold them are there."""
    for name in (BLOCKS, BAD):
        storage.delete_folder(storage.join(folder, name))
