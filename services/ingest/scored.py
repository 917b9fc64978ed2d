"""Scored images in storage, until they are paired: ``scored/{number}.parquet``, whole or not at all.

A row is an image. Images of one ``group`` are compared: those of a prompt, or the two of a pair that is
labeled anew, which then has a ``pair_id``, and ``preferred`` for the image that people preferred.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from services.stages import layout
from services.storage import files

CHUNK_IMAGES = 64
"""Images of a chunk, if a group does not have more."""
DICTIONARY_BYTES = 1 << 30
"""An image that is in several rows is stored once."""
_BAD = b"bad"
SCHEMA = pa.schema(
    {
        "group": pa.int64(),
        "caption": pa.string(),
        "uid": pa.string(),
        "image": pa.large_binary(),
        "pair_id": pa.string(),
        "preferred": pa.bool_(),
        "scores": pa.list_(pa.float64()),
    }
)


def commit(folder: str, number: int, images: Sequence[Mapping[str, Any]], bad: Mapping[str, int]) -> None:
    """Write chunk ``number``: its images, and how many pairs cannot be used, by cause."""
    metadata = {_BAD: json.dumps(bad).encode()}
    table = pa.Table.from_pylist(list(images), SCHEMA).replace_schema_metadata(metadata)
    files.write_bytes(layout.scored_uri(folder, number), parquet_bytes(table, ["image"]))


def parquet_bytes(table: pa.Table, image_columns: list[str]) -> bytes:
    """The table as a Parquet file. Image files are compressed already."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="none",
        use_dictionary=image_columns,
        dictionary_pagesize_limit=DICTIONARY_BYTES,
        write_statistics=False,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def committed(folder: str) -> set[int]:
    """The numbers of the committed chunks."""
    numbers = (layout.scored_number(name) for name in files.list_files(layout.scored_folder(folder)))
    return {number for number in numbers if number is not None}


def read(folder: str, number: int, columns: list[str] | None = None) -> pa.Table:
    """A committed chunk, or some of its columns, in which images are not read."""
    filesystem, path = files.resolve(layout.scored_uri(folder, number))
    return pq.ParquetFile(filesystem.open_input_file(path)).read(columns)


def bad_of(table: pa.Table) -> Counter[str]:
    """How many pairs of a chunk cannot be used, by cause."""
    return Counter(json.loads(table.schema.metadata[_BAD]))


def clear(folder: str) -> None:
    """Delete all chunks, once they are paired."""
    files.delete_folder(layout.scored_folder(folder))
