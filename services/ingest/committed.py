"""Encoded blocks in storage, until they are joined into shards.

A block is ``blocks/{number}.parquet``, and ``bad/{number}.json`` holds its unusable images. The JSON is
written first, so a block is committed once its Parquet file exists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dde_core.latents.writer import shard_table
from services.stages import layout
from services.storage import files, sources

READ_THREADS = 16
NO_BAD_IMAGES = "{}"


def commit(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """Write a block.

    In: ``block`` (its number), ``latents`` (float16 [n c h w] as bytes), ``metadata`` and ``bad`` (both JSON,
    as ``read_images`` makes them). Out: ``block``, ``images`` (how many it holds) and ``bad``.
    """
    metadata: list[Any] = json.loads(row["metadata"])
    if row["bad"] != NO_BAD_IMAGES:
        files.write_bytes(layout.bad_images_uri(folder, row["block"]), row["bad"].encode())
    latents = np.frombuffer(row["latents"], np.float16)
    columns: dict[str, Any] = {
        "uid": [uid for uid, *_ in metadata],
        "sha256": [bytes.fromhex(sha256) for _, sha256, *_ in metadata],
        "size": [size for *_, size, _, _ in metadata],
        "crop": [crop for *_, crop, _ in metadata],
        "transparent": [is_transparent for *_, is_transparent in metadata],
        "latents": latents,
    }
    schema = pa.schema(
        {
            "uid": pa.string(),
            "sha256": pa.binary(32),
            "size": pa.list_(pa.int32(), 2),
            "crop": pa.list_(pa.int32(), 2),
            "transparent": pa.bool_(),
            "latents": pa.list_(pa.float16(), max(1, len(latents) // max(1, len(metadata)))),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        shard_table(columns, schema), sink, compression="none", use_dictionary=False, write_statistics=False
    )
    files.write_bytes(layout.block_uri(folder, row["block"]), sink.getvalue().to_pybytes())
    return {"block": row["block"], "images": len(metadata), "bad": row["bad"]}


def committed_blocks(folder: str) -> set[int]:
    """The numbers of the committed blocks."""
    return _numbers(layout.blocks_folder(folder))


def delete_uncommitted(folder: str, committed: set[int]) -> None:
    """Delete the bad images of other blocks: they are recorded again when these blocks are encoded."""
    for number in _numbers(layout.bad_images_folder(folder)) - committed:
        files.delete_file(layout.bad_images_uri(folder, number))


def bad_images(folder: str, blocks: set[int]) -> Iterator[tuple[int, str]]:
    """(block, ``bad`` as ``commit`` received it) of those of these blocks that have bad images."""
    numbers = sorted(_numbers(layout.bad_images_folder(folder)) & blocks)
    uris = [layout.bad_images_uri(folder, number) for number in numbers]
    with sources.in_threads(files.read_bytes, uris, READ_THREADS) as contents:
        for number, content in zip(numbers, contents, strict=True):
            yield number, content.decode()


def _numbers(folder: str) -> set[int]:
    numbers = (layout.block_number(name) for name in files.list_files(folder))
    return {number for number in numbers if number is not None}


def read_block(folder: str, number: int, uids: set[str]) -> dict[str, dict[str, Any]]:
    """The requested images of a committed block, by uid.

    Each has ``latents`` (float16 [n]), ``sha256``, ``size``, ``crop`` and ``transparent``. Images that the
    block lacks are absent.
    """
    table = pq.read_table(pa.BufferReader(files.read_bytes(layout.block_uri(folder, number))))
    indices = [index for index, uid in enumerate(table["uid"].to_pylist()) if uid in uids]
    if not indices:
        return {}
    latents = table["latents"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    rows = table.drop_columns(["latents"]).take(pa.array(indices, pa.int64())).to_pylist()
    return {
        row["uid"]: {**row, "latents": latents[index].copy()}
        for index, row in zip(indices, rows, strict=True)
    }


def clear(folder: str) -> None:
    """Delete all blocks, once the shards hold their content."""
    files.delete_folder(layout.blocks_folder(folder))
    files.delete_folder(layout.bad_images_folder(folder))
