"""Encoded blocks in storage, until they are joined into shards: ``blocks/{number}.parquet`` and, beside, ``bad/{number}.json``.

A block is committed once its Parquet file is there. The images of it that could not be used were written before that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dde_core.latents.writer import shard_table
from services.stages import layout
from services.storage import files

READS_AT_ONCE = 16


def commit(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """Write a block. Needs ``block``, ``latents`` (float16 [n c h w] as bytes), ``about`` and ``bad``; makes ``block``,
    ``images`` (how many are in it) and ``bad``."""
    about: list[Any] = json.loads(row["about"])
    if row["bad"] != "{}":
        files.write_bytes(layout.bad_images_uri(folder, row["block"]), row["bad"].encode())
    columns: dict[str, Any] = {
        "uid": [uid for uid, *_ in about],
        "sha256": [bytes.fromhex(sha256) for _, sha256, *_ in about],
        "size": [size for *_, size, _ in about],
        "crop": [crop for *_, crop in about],
        "latents": np.frombuffer(row["latents"], np.float16),
    }
    pair, latents = (
        pa.list_(pa.int32(), 2),
        pa.list_(pa.float16(), max(1, len(columns["latents"]) // max(1, len(about)))),
    )
    kinds = {"uid": pa.string(), "sha256": pa.binary(32), "size": pair, "crop": pair, "latents": latents}
    sink = pa.BufferOutputStream()
    pq.write_table(
        shard_table(columns, pa.schema(kinds)),
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    files.write_bytes(layout.block_uri(folder, row["block"]), sink.getvalue().to_pybytes())
    return {"block": row["block"], "images": len(about), "bad": row["bad"]}


def committed_blocks(folder: str) -> set[int]:
    """The numbers of the blocks that are there. What was said of others is dropped: it is said anew when they are encoded."""
    done = _numbers(layout.blocks_folder(folder))
    for number in _numbers(layout.bad_images_folder(folder)) - done:
        files.delete_file(layout.bad_images_uri(folder, number))
    return done


def bad_images(folder: str, blocks: set[int]) -> Iterator[tuple[int, str]]:
    """(block, JSON as ``commit`` got it) of those of these blocks that have any."""
    numbers = sorted(_numbers(layout.bad_images_folder(folder)) & blocks)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        contents = pool.map(lambda number: files.read_bytes(layout.bad_images_uri(folder, number)), numbers)
        for number, content in zip(numbers, contents, strict=True):
            yield number, content.decode()


def _numbers(folder: str) -> set[int]:
    numbers = (layout.block_number(name) for name in files.list_files(folder))
    return {number for number in numbers if number is not None}


def read_block(folder: str, number: int, uids: set[str]) -> dict[str, dict[str, Any]]:
    """The committed images of a block that are requested, by uid: ``latents`` float16 [n], ``sha256``, ``size``, ``crop``."""
    table = pq.read_table(pa.BufferReader(files.read_bytes(layout.block_uri(folder, number))))
    places = [place for place, uid in enumerate(table["uid"].to_pylist()) if uid in uids]
    latents = (
        table["latents"].combine_chunks().flatten().to_numpy().reshape(len(table), -1) if len(table) else []
    )
    rows = table.drop_columns(["latents"]).take(pa.array(places, pa.int64())).to_pylist()
    return {
        row["uid"]: {**row, "latents": latents[place].copy()} for place, row in zip(places, rows, strict=True)
    }


def clear(folder: str) -> None:
    """Drop the blocks once the shards that hold them are there."""
    files.delete_folder(layout.blocks_folder(folder))
    files.delete_folder(layout.bad_images_folder(folder))
