"""Preference pairs as teams have them: Parquet with Pick-a-Pic's columns. What a row means is decided here, once.

``label_0``/``label_1`` say how much of the preference each picture got. A row is **decided** where they sum to one and
differ, a **tie** where they are equal or both pictures have one uid, **missing** where a label is null, NaN or no share, where
``has_label`` is false, or where there is no caption. The control plane
reads everything but the pictures to check and count a dataset; ingest reads the same, then the pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from services import storage
from services.contracts import DatasetCounts
from services.errors import BadRequest

IMAGE_COLUMNS = ("jpg_0", "jpg_1")
LIGHT_COLUMNS = ("image_0_uid", "image_1_uid", "label_0", "label_1", "caption")
_TYPES = {
    **dict.fromkeys(IMAGE_COLUMNS, (pa.types.is_binary, pa.types.is_large_binary)),
    **dict.fromkeys(("label_0", "label_1"), (pa.types.is_floating, pa.types.is_integer, pa.types.is_null)),
    **dict.fromkeys(("image_0_uid", "image_1_uid", "caption"), (pa.types.is_string, pa.types.is_large_string)),
}


@dataclass(frozen=True)
class PairRow:
    """One row without its pictures. ``file`` is relative to the dataset's URI; ``row`` counts within the row group."""

    file: str
    row_group: int
    row: int
    uid_0: str
    uid_1: str
    caption: str
    label_0: float | None
    label_1: float | None
    has_label: bool = True

    @property
    def kind(self) -> str:
        """ "pair", "tie" or "missing"."""
        labels = [label for label in (self.label_0, self.label_1) if label is not None and not math.isnan(label)]
        if not self.has_label or len(labels) < 2 or not self.caption:
            return "missing"
        if labels[0] == labels[1] or self.uid_0 == self.uid_1:
            return "tie"
        return "pair" if math.isclose(sum(labels), 1.0, abs_tol=1e-6) and min(labels) >= 0 else "missing"

    @property
    def winner_first(self) -> tuple[str, str, float]:
        """(the winner's uid, the loser's uid, the winner's label) of a decided pair."""
        label_0, label_1 = float(self.label_0 or 0), float(self.label_1 or 0)
        return (self.uid_0, self.uid_1, label_0) if label_0 > label_1 else (self.uid_1, self.uid_0, label_1)

    @property
    def key(self) -> str:
        """Where the row stands in its source."""
        return f"{self.file}:{self.row_group}:{self.row}"


def parquet_files(uri: str) -> list[str]:
    """The Parquet files of a dataset, relative to its URI ("" where the URI is one file). Raises BadRequest."""
    filesystem, path = storage.resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return [""]
    files = [name for name in storage.list_files(uri, recursive=True) if name.endswith(".parquet")]
    if info.type == fs.FileType.NotFound:
        raise BadRequest(f"uri {uri!r} does not exist", param="uri", code="not_found")
    if not files:
        raise BadRequest(f"uri {uri!r} holds no .parquet file", param="uri")
    return files


def open_parquet(uri: str, file: str) -> pq.ParquetFile:
    """Open one file of a dataset. Raises BadRequest where it is no Parquet or lacks a column."""
    full = storage.join(uri, file) if file else uri
    filesystem, path = storage.resolve(full)
    try:
        parquet = pq.ParquetFile(filesystem.open_input_file(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise BadRequest(f"uri {full!r} is not a Parquet file: {error}", param="uri", code="not_parquet") from error
    schema = parquet.schema_arrow
    missing = [name for name in _TYPES if name not in schema.names]
    if missing:
        raise BadRequest(f"uri {full!r} lacks the columns {', '.join(missing)}", param="uri", code="missing_columns")
    for name, allowed in _TYPES.items():
        if not any(check(schema.field(name).type) for check in allowed):
            wanted = " or ".join(check.__name__.removeprefix("is_") for check in allowed if check is not pa.types.is_null)
            message = f"column {name} of {full!r} has the wrong type {schema.field(name).type}, it must be {wanted}"
            raise BadRequest(message, param="uri", code="wrong_column_type")
    return parquet


def read_rows(uri: str) -> Iterator[PairRow]:
    """Every row of a dataset without its pictures, file by file. Raises BadRequest at the first unusable file."""
    for file in parquet_files(uri):
        parquet = open_parquet(uri, file)
        columns = [*LIGHT_COLUMNS, *(["has_label"] if "has_label" in parquet.schema_arrow.names else [])]
        for group in range(parquet.num_row_groups):
            row = 0
            for batch in parquet.iter_batches(row_groups=[group], columns=columns):
                for values in batch.to_pylist():
                    yield _pair_row(file, group, row, values)
                    row += 1


def _pair_row(file: str, group: int, row: int, values: dict) -> PairRow:
    has_label, place = values.get("has_label"), f"{file}:{group}:{row}"
    return PairRow(
        file=file,
        row_group=group,
        row=row,
        uid_0=values["image_0_uid"] or f"{place}:0",
        uid_1=values["image_1_uid"] or f"{place}:1",
        caption=values["caption"] or "",
        label_0=values["label_0"],
        label_1=values["label_1"],
        has_label=has_label is None or bool(has_label),
    )


def inspect(uri: str) -> tuple[DatasetCounts, str]:
    """``summarise`` of every row of a dataset."""
    return summarise(uri, read_rows(uri))


def summarise(uri: str, rows: Iterable[PairRow]) -> tuple[DatasetCounts, str]:
    """Count a dataset's rows, and digest it: sha256 over the sorted hashes of rows and of the files' Parquet footers.

    The pictures are not read; a footer holds the size and place of every column chunk, so pictures that were replaced
    show. Raises BadRequest where a file cannot be used or no pair is decided.
    """
    counts, hashes = {"pair": 0, "tie": 0, "missing": 0}, []
    for row in rows:
        counts[row.kind] += 1
        content = [row.uid_0, row.uid_1, row.caption, row.label_0, row.label_1, row.has_label]
        hashes.append(hashlib.sha256(json.dumps(content).encode()).digest())
    if not counts["pair"]:
        raise BadRequest(
            f"uri {uri!r} has no decided pair: {len(hashes)} rows, {counts['tie']} ties, {counts['missing']} without a label",
            param="uri",
            code="no_decided_pair",
        )
    hashes += [hashlib.sha256(_footer(uri, file)).digest() for file in parquet_files(uri)]
    found = DatasetCounts(rows=sum(counts.values()), pairs=counts["pair"], ties=counts["tie"], missing=counts["missing"])
    return found, hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


def _footer(uri: str, file: str) -> bytes:
    """A Parquet file's name, size and metadata."""
    filesystem, path = storage.resolve(storage.join(uri, file) if file else uri)
    with filesystem.open_input_file(path) as stream:
        size = stream.size()
        length = int.from_bytes(stream.read_at(4, size - 8), "little")
        return f"{file}\0{size}\0".encode() + stream.read_at(length, size - 8 - length)
