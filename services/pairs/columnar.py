"""Files that hold rows with their types, read in order and in bounded pieces: Parquet and Arrow streams.

A reader (also those of services/pairs/path_based.py) lists the columns, cuts itself into units, and yields the rows of a
unit as cells by canonical name. It knows nothing of what a row means (services/pairs/row.py). A reader holds URIs and
names only, so it can be pickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from services.errors import BadRequest, ServiceError, Unavailable
from services.pairs.column_types import Columns, Found, check_types, is_text
from services.storage import files

BATCH_BYTES = 1 << 24
ROWS_AT_ONCE = 256
IMAGE_ROWS_AT_ONCE = 64
STREAM_BYTES = 1 << 20
IMAGE_COLUMNS = frozenset({"jpg_0", "jpg_1", "chosen", "rejected", "images"})


@dataclass(frozen=True)
class Unit:
    """A stretch of rows that is read in order. ``rows`` is None where they were not counted.

    A Parquet row group, an Arrow file, the lines that begin in bytes ``start..stop`` of a file, or the images ``names`` of
    a folder.
    """

    file: str
    group: int = 0
    rows: int | None = None
    start: int = 0
    stop: int = 0
    names: tuple[tuple[str, ...], ...] = ()


Format = Literal["parquet", "arrow", "jsonl", "folders"]
Cells = dict[str, Any]


class Reader(Protocol):
    """``rows`` gives cells by the names that are read, or the cause why there are none; from row ``start`` up to ``stop``."""

    @property
    def format(self) -> Format: ...
    def columns(self) -> Found: ...
    def units(self) -> Iterator[Unit]: ...
    def rows(
        self, unit: Unit, columns: Columns, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | str]: ...
    def identity(self) -> Iterator[bytes]: ...


def full_uri(uri: str, file: str) -> str:
    """Where a file of a dataset lies; "" is the URI itself."""
    return files.join(uri, file) if file else uri


def unreadable(error: Exception, uri: str, why: str, code: str | None = None) -> ServiceError:
    """What a file that cannot be read means: an object store that goes on failing, or a file that is not what it should be."""
    if "AWS Error" in str(error):
        return Unavailable(f"uri {uri!r}: the object store goes on failing: {error}", param="uri")
    return BadRequest(f"uri {uri!r} {why}: {error}", param="uri", code=code)


def open_file(uri: str, file: str) -> pa.NativeFile:
    """A file of a dataset for random access."""
    filesystem, path = files.resolve(full_uri(uri, file))
    return filesystem.open_input_file(path)


def name_and_size(uri: str, file: str) -> bytes:
    filesystem, path = files.resolve(full_uri(uri, file))
    return f"{file}\0{filesystem.get_file_info(path).size}\0".encode()


@dataclass(frozen=True)
class ParquetFiles:
    """A unit is a row group, which is decoded a few rows at a time: what is held is a page of each column, not the group.

    pyarrow and pandas write pages of 1024 rows where rows are large.
    """

    uri: str
    files: tuple[str, ...]
    format: Format = "parquet"

    def columns(self) -> Found:
        return _types(self._open(self.files[0]).schema_arrow)

    def units(self) -> Iterator[Unit]:
        for file in self.files:
            metadata = self._open(file).metadata
            for group in range(metadata.num_row_groups):
                yield Unit(file, group, metadata.row_group(group).num_rows)

    def rows(
        self, unit: Unit, columns: Columns, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | str]:
        stream, footer = self._stream(unit.file)
        parquet = pq.ParquetFile(stream, metadata=footer, buffer_size=STREAM_BYTES, pre_buffer=False)
        check_types(full_uri(self.uri, unit.file), _types(parquet.schema_arrow), columns)
        leaves, row_bytes, left_out = _leaves(
            parquet, unit.group, _wanted(parquet.schema_arrow, columns, with_images), with_images
        )
        if (
            not with_images and row_bytes * footer.row_group(unit.group).num_rows <= BATCH_BYTES
        ):  # all of it in few requests
            parquet = pq.ParquetFile(stream, metadata=footer, pre_buffer=True)
        at_once = IMAGE_ROWS_AT_ONCE if with_images else ROWS_AT_ONCE
        size = max(1, min(at_once, BATCH_BYTES // max(1, row_bytes)))
        batches = parquet.iter_batches(batch_size=size, row_groups=[unit.group], columns=leaves)
        yield from _cells(batches, columns, with_images, start, stop, left_out)

    def identity(self) -> Iterator[bytes]:
        """Names, sizes and Parquet footers: a footer holds the size and place of every column chunk."""
        for file in self.files:
            with open_file(self.uri, file) as stream:
                size = stream.size()
                length = int.from_bytes(stream.read_at(4, size - 8), "little")
                yield f"{file}\0{size}\0".encode() + stream.read_at(length, size - 8 - length)

    def _open(self, file: str) -> pq.ParquetFile:
        stream, footer = self._stream(file)
        return pq.ParquetFile(stream, metadata=footer)

    def _stream(self, file: str) -> tuple[pa.NativeFile, pq.FileMetaData]:
        full = full_uri(self.uri, file)
        filesystem, path = files.resolve(full)
        try:
            info = filesystem.get_file_info(path)
            footer = _footer(full, info.size, info.mtime_ns)
            return filesystem.open_input_file(path), footer
        except (pa.ArrowInvalid, OSError) as error:
            raise unreadable(error, full, "is not a Parquet file", "not_parquet") from error


@lru_cache(maxsize=2)
def _footer(uri: str, size: int, mtime_ns: int) -> pq.FileMetaData:
    """The footer is parsed once for all row groups of a file: size and time of change tell whether it is the same file."""
    filesystem, path = files.resolve(uri)
    with filesystem.open_input_file(path) as stream:
        return pq.read_metadata(stream)


def _leaves(
    parquet: pq.ParquetFile, group: int, names: set[str], with_images: bool
) -> tuple[list[str], int, set[str]]:
    """The leaf columns to read, their mean bytes a row, and the columns whose bytes are left out although they are there.

    Without images, bytes inside of structs are left out where the footer says that all or none of them are null.
    """
    metadata, leaves, total, left_out = parquet.metadata.row_group(group), [], 0, set()
    paths = [parquet.schema.column(index).path for index in range(metadata.num_columns)]
    for index, path in enumerate(paths):
        name = next((name for name in names if path == name or path.startswith(f"{name}.")), None)
        column = metadata.column(index)
        nulls = None if with_images or f"{path.removesuffix('.bytes')}.path" not in paths else _nulls(column)
        if name is None or nulls == column.num_values:
            continue
        if nulls == 0:
            left_out.add(name)
        else:
            leaves.append(path)
            total += column.total_uncompressed_size
    return leaves, total // max(1, metadata.num_rows), left_out


def _nulls(column: pq.ColumnChunkMetaData) -> int | None:
    """How many values of a column chunk are null, where its file says so."""
    statistics = column.statistics
    return statistics.null_count if statistics is not None and statistics.has_null_count else None


@dataclass(frozen=True)
class ArrowFiles:
    """Hugging Face's `save_to_disk`: Arrow IPC streams, a unit each. Local files are mapped, others read a batch at a time."""

    uri: str
    files: tuple[str, ...]
    format: Format = "arrow"

    def columns(self) -> Found:
        with self._open(self.files[0]) as reader:
            return _types(reader.schema)

    def units(self) -> Iterator[Unit]:
        yield from (Unit(file) for file in self.files)

    def rows(
        self, unit: Unit, columns: Columns, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | str]:
        with self._open(unit.file) as reader:
            check_types(full_uri(self.uri, unit.file), _types(reader.schema), columns)
            names = sorted(_wanted(reader.schema, columns, with_images))
            small = (
                batch.select(names).slice(offset, IMAGE_ROWS_AT_ONCE)
                for batch in reader
                for offset in range(0, len(batch), IMAGE_ROWS_AT_ONCE)
            )
            yield from _cells(small, columns, with_images, start, stop)

    def identity(self) -> Iterator[bytes]:
        yield from (name_and_size(self.uri, file) for file in self.files)

    def _open(self, file: str) -> pa.RecordBatchStreamReader:
        full = full_uri(self.uri, file)
        filesystem, path = files.resolve(full)
        try:
            local = isinstance(filesystem, fs.LocalFileSystem)
            return pa.ipc.open_stream(pa.memory_map(path) if local else filesystem.open_input_stream(path))
        except (pa.ArrowInvalid, OSError) as error:
            raise unreadable(error, full, "is not an Arrow stream", "not_arrow") from error


def _types(schema: pa.Schema) -> Found:
    return {field.name: field.type for field in schema}


def _wanted(schema: pa.Schema, columns: Columns, with_images: bool) -> set[str]:
    """Names in the file. Without images a column of bytes is left out, but a ranking's, which says how many there are;
    structs say whether a path is what is read."""

    def light(name: str) -> bool:
        kind = schema.field(columns[name]).type  # type: ignore[index]
        return name not in IMAGE_COLUMNS or name == "images" or is_text(kind) or pa.types.is_struct(kind)

    return {columns[name] for name in columns if with_images or light(name)}


def _cells(
    batches: Iterator[pa.RecordBatch],
    columns: Columns,
    with_images: bool,
    start: int,
    stop: int | None,
    left_out: Set[str] = frozenset(),
) -> Iterator[Cells]:
    row, light = 0, frozenset() if with_images else IMAGE_COLUMNS
    for batch in batches:
        if stop is not None and row >= stop:
            return
        skip, end = max(0, start - row), len(batch) if stop is None else min(len(batch), stop - row)
        row += len(batch)
        if skip < end:
            part = batch.slice(skip, end - skip)
            values = {
                name: _without_bytes(part.column(own), own in left_out)
                if name in light
                else _python(part.column(own))
                for name, own in columns.items()
                if own in part.schema.names
            }
            for place in range(len(part)):
                yield {name: column[place] for name, column in values.items()}


def _without_bytes(column: pa.Array, left_out: bool) -> list[Any]:
    """Cells of images with empty bytes for those that are there; ``left_out`` says that every struct of the file has some."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        flat = iter(_without_bytes(column.flatten(), left_out))
        return [
            None if n is None else list(islice(flat, n)) for n in pc.list_value_length(column).to_pylist()
        ]
    if pa.types.is_struct(kind):
        fields = {
            field.name: _without_bytes(column.field(index), left_out) for index, field in enumerate(kind)
        }
        fields |= {"bytes": [b""] * len(column)} if left_out else {}
        cells = (dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True))
        return [
            cell if valid else None for cell, valid in zip(cells, column.is_valid().to_pylist(), strict=True)
        ]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return [b"" if valid else None for valid in column.is_valid().to_pylist()]
    return _python(column)


def _python(column: pa.Array) -> list[Any]:
    """Python values; a cell with text that is not UTF-8, which Parquet does not check, becomes empty bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_one(value) for value in column]


def _one(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b""
