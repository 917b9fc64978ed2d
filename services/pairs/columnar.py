"""Readers of typed columns: Parquet files and Arrow streams, in order and in bounded memory.

A reader (also those of path_based.py, documents.py and tars.py) lists the columns, splits its files into
units, and yields each row of a unit as cells by canonical name. It does not interpret a row; row.py does. A
reader holds only URIs and names, so it can be pickled.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, Literal, Protocol, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from services.errors import BadRequest, ServiceError, Unavailable
from services.pairs.column_types import (
    ColumnMap,
    FileColumns,
    check_types,
    is_binary,
    is_list,
    is_text,
)
from services.storage import files, sources

BATCH_BYTES = 1 << 24
BATCH_ROWS = 256
IMAGE_BATCH_ROWS = 64
STREAM_BYTES = 1 << 20
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
"""First bytes of a compressed file -> pyarrow's name of the compression."""
IMAGE_COLUMNS = frozenset({"jpg_0", "jpg_1", "chosen", "rejected", "images"})


@dataclass(frozen=True)
class Unit:
    """Rows that are read in order: the smallest piece that can be read independently.

    A Parquet row group, a file of another format, the lines that begin in bytes ``start..stop`` of a file, or
    the images ``names`` of a folder. ``rows`` is None where counting would require reading.
    """

    file: str
    group: int = 0
    rows: int | None = None
    start: int = 0
    stop: int = 0
    names: tuple[tuple[str, ...], ...] = ()


Format = Literal["parquet", "arrow", "jsonl", "json", "csv", "tar", "folders"]
Cells = dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """A row without cells: ``cause`` is an identifier for counting, ``detail`` is for people."""

    cause: str
    detail: str = ""


class Reader(Protocol):
    """The files of a source. Each reader is for one format."""

    @property
    def format(self) -> Format: ...

    def columns(self) -> FileColumns: ...

    def units(self) -> Iterator[Unit]: ...

    def rows(
        self, unit: Unit, columns: ColumnMap, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | Unreadable]:
        """Rows ``start`` to ``stop`` of a unit: cells by canonical name, or why a row is unreadable."""

    def identity(self) -> Iterator[bytes]:
        """What identifies the files' content without reading it."""


def full_uri(uri: str, file: str) -> str:
    """The URI of a dataset's file; "" is the dataset's URI itself."""
    return files.join(uri, file) if file else uri


def unreadable(error: Exception, uri: str, why: str, code: str | None = None) -> ServiceError:
    """The error to raise for a file that cannot be read.

    Unavailable where the object store failed, else BadRequest: the file is not what it should be.
    """
    if "AWS Error" in str(error):
        return Unavailable(f"uri {uri!r}: the object store keeps failing, try again: {error}", param="uri")
    return BadRequest(f"uri {uri!r} {why}: {error}", param="uri", code=code)


def open_file(uri: str, file: str) -> pa.NativeFile:
    """Open a dataset's file for random access."""
    return sources.open_file(full_uri(uri, file))


def compression_of(stream: pa.NativeFile) -> str | None:
    """How a file is compressed, by its first bytes; the stream is back at its start."""
    head = stream.read(4)
    stream.seek(0)
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def open_decompressed(uri: str, file: str) -> BinaryIO:
    """Open a dataset's file for reading from its start, without its compression.

    Reading raises OSError where a compressed file is cut off.
    """
    stream = open_file(uri, file)
    compression = compression_of(stream)
    if compression:
        stream = pa.CompressedInputStream(stream, compression)
    return io.BufferedReader(cast(io.RawIOBase, stream), STREAM_BYTES)


def name_and_size(uri: str, file: str) -> bytes:
    filesystem, path = sources.resolve(full_uri(uri, file))
    return f"{file}\0{filesystem.get_file_info(path).size}\0".encode()


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files; a unit is a row group.

    A row group is decoded a few rows at a time, so memory holds a page of each column and not the group.
    pyarrow and pandas write pages of 1024 rows where rows are large.
    """

    uri: str
    files: tuple[str, ...]
    format: Format = "parquet"

    def columns(self) -> FileColumns:
        return _types(full_uri(self.uri, self.files[0]), self._open(self.files[0]).schema_arrow)

    def units(self) -> Iterator[Unit]:
        for file in self.files:
            metadata = self._open(file).metadata
            for group in range(metadata.num_row_groups):
                yield Unit(file, group, metadata.row_group(group).num_rows)

    def rows(
        self, unit: Unit, columns: ColumnMap, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | Unreadable]:
        stream, footer = self._stream(unit.file)
        parquet = pq.ParquetFile(stream, metadata=footer, buffer_size=STREAM_BYTES, pre_buffer=False)
        uri = full_uri(self.uri, unit.file)
        check_types(uri, _types(uri, parquet.schema_arrow), columns)
        names = _names_to_read(parquet.schema_arrow, columns, with_images)
        selection = _select_leaves(parquet, unit.group, names, with_images)
        group_bytes = selection.row_bytes * footer.row_group(unit.group).num_rows
        if not with_images and group_bytes <= BATCH_BYTES:
            # Small enough to fetch the whole group in few requests.
            parquet = pq.ParquetFile(stream, metadata=footer, pre_buffer=True)
        max_rows = IMAGE_BATCH_ROWS if with_images else BATCH_ROWS
        batches = parquet.iter_batches(
            batch_size=max(1, min(max_rows, BATCH_BYTES // max(1, selection.row_bytes))),
            row_groups=[unit.group],
            columns=selection.leaves,
        )
        yield from _cells(batches, columns, with_images, start, stop, selection.omitted_bytes)

    def identity(self) -> Iterator[bytes]:
        """Names, sizes and Parquet footers: a footer holds the size and offset of every column chunk."""
        for file in self.files:
            with open_file(self.uri, file) as stream:
                size = stream.size()
                length = int.from_bytes(stream.read_at(4, size - 8), "little")
                yield f"{file}\0{size}\0".encode() + stream.read_at(length, size - 8 - length)

    def _open(self, file: str) -> pq.ParquetFile:
        stream, footer = self._stream(file)
        return pq.ParquetFile(stream, metadata=footer)

    def _stream(self, file: str) -> tuple[pa.NativeFile, pq.FileMetaData]:
        uri = full_uri(self.uri, file)
        filesystem, path = sources.resolve(uri)
        try:
            info = filesystem.get_file_info(path)
            footer = _footer(uri, info.size, info.mtime_ns)
            return filesystem.open_input_file(path), footer
        except (pa.ArrowInvalid, OSError) as error:
            raise unreadable(error, uri, "is not a complete Parquet file", "not_parquet") from error


@lru_cache(maxsize=2)
def _footer(uri: str, size: int, mtime_ns: int) -> pq.FileMetaData:
    """Parse a file's footer once for all its row groups; a changed size or mtime means another file."""
    filesystem, path = sources.resolve(uri)
    with filesystem.open_input_file(path) as stream:
        return pq.read_metadata(stream)


@dataclass(frozen=True)
class _Selection:
    """Leaf columns to read, their mean bytes a row, and the columns whose non-null bytes are not read."""

    leaves: list[str]
    row_bytes: int
    omitted_bytes: set[str]


def _select_leaves(parquet: pq.ParquetFile, group: int, names: set[str], with_images: bool) -> _Selection:
    """Choose the leaf columns of a row group.

    Without images, the bytes inside structs are omitted where the footer says that all or none are null.
    """
    metadata = parquet.metadata.row_group(group)
    paths = [parquet.schema.column(index).path for index in range(metadata.num_columns)]
    leaves: list[str] = []
    omitted_bytes: set[str] = set()
    total_bytes = 0
    for index, path in enumerate(paths):
        name = next((name for name in names if path == name or path.startswith(f"{name}.")), None)
        if name is None:
            continue
        column = metadata.column(index)
        is_struct_bytes = f"{path.removesuffix('.bytes')}.path" in paths
        nulls = _null_count(column) if is_struct_bytes and not with_images else None
        if nulls == column.num_values:
            continue
        if nulls == 0:
            omitted_bytes.add(name)
        else:
            leaves.append(path)
            total_bytes += column.total_uncompressed_size
    return _Selection(leaves, total_bytes // max(1, metadata.num_rows), omitted_bytes)


def _null_count(column: pq.ColumnChunkMetaData) -> int | None:
    """The number of nulls in a column chunk; None where its file does not say."""
    statistics = column.statistics
    if statistics is None or not statistics.has_null_count:
        return None
    return int(statistics.null_count)


@dataclass(frozen=True)
class WholeFiles:
    """Files of a reader whose units are whole files: each is read from its start."""

    uri: str
    files: tuple[str, ...]

    def units(self) -> Iterator[Unit]:
        yield from (Unit(file) for file in self.files)

    def identity(self) -> Iterator[bytes]:
        yield from (name_and_size(self.uri, file) for file in self.files)


@dataclass(frozen=True)
class ArrowFiles(WholeFiles):
    """Arrow IPC streams of Hugging Face's `save_to_disk`.

    Local files are memory-mapped, others are read a batch at a time.
    """

    format: Format = "arrow"

    def columns(self) -> FileColumns:
        with self._open(self.files[0]) as reader:
            return _types(full_uri(self.uri, self.files[0]), reader.schema)

    def rows(
        self, unit: Unit, columns: ColumnMap, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | Unreadable]:
        with self._open(unit.file) as reader:
            uri = full_uri(self.uri, unit.file)
            check_types(uri, _types(uri, reader.schema), columns)
            names = sorted(_names_to_read(reader.schema, columns, with_images))
            small_batches = (
                batch.select(names).slice(offset, IMAGE_BATCH_ROWS)
                for batch in reader
                for offset in range(0, len(batch), IMAGE_BATCH_ROWS)
            )
            yield from _cells(small_batches, columns, with_images, start, stop)

    def _open(self, file: str) -> pa.RecordBatchStreamReader:
        uri = full_uri(self.uri, file)
        filesystem, path = sources.resolve(uri)
        try:
            if isinstance(filesystem, fs.LocalFileSystem):
                return pa.ipc.open_stream(pa.memory_map(path))
            return pa.ipc.open_stream(filesystem.open_input_stream(path))
        except (pa.ArrowInvalid, OSError) as error:
            raise unreadable(error, uri, "is not a complete Arrow stream", "not_arrow") from error


def _types(uri: str, schema: pa.Schema) -> FileColumns:
    """The columns of a file. Raises BadRequest for a name that it has twice: either could be meant."""
    repeated = sorted(name for name, count in Counter(schema.names).items() if count > 1)
    if repeated:
        message = f"uri {uri!r} has several columns called {', '.join(repeated)}: rename them"
        raise BadRequest(message, param="uri", code="repeated_columns")
    return {field.name: field.type for field in schema}


def _names_to_read(schema: pa.Schema, columns: ColumnMap, with_images: bool) -> set[str]:
    """Names in the file.

    Without images, plain bytes are not read. A ranking's list is still read for the number of images, and a
    struct for its path.
    """

    def is_light(column: str, name: str) -> bool:
        kind = schema.field(name).type
        return (
            column not in IMAGE_COLUMNS
            or column == "images"
            or is_text(kind)
            or bool(pa.types.is_struct(kind))
        )

    return {name for column, name in columns.items() if with_images or is_light(column, name)}


def _cells(
    batches: Iterable[pa.RecordBatch],
    columns: ColumnMap,
    with_images: bool,
    start: int,
    stop: int | None,
    omitted_bytes: Set[str] = frozenset(),
) -> Iterator[Cells]:
    """Rows ``start`` to ``stop`` of the batches as cells by canonical name."""
    first_row = 0
    for batch in batches:
        if stop is not None and first_row >= stop:
            return
        begin = max(0, start - first_row)
        end = len(batch) if stop is None else min(len(batch), stop - first_row)
        first_row += len(batch)
        if begin < end:
            yield from _batch_cells(batch.slice(begin, end - begin), columns, with_images, omitted_bytes)


def _batch_cells(
    batch: pa.RecordBatch, columns: ColumnMap, with_images: bool, omitted_bytes: Set[str]
) -> Iterator[Cells]:
    values: dict[str, list[Any]] = {}
    for column, name in columns.items():
        if name not in batch.schema.names:
            continue
        if column in IMAGE_COLUMNS and not with_images:
            values[column] = _without_bytes(batch.column(name), name in omitted_bytes)
        else:
            values[column] = _python(batch.column(name))
    for row in range(len(batch)):
        yield {column: cells[row] for column, cells in values.items()}


def _without_bytes(column: pa.Array, omitted_bytes: bool) -> list[Any]:
    """Cells of images, with empty bytes in place of non-null bytes.

    ``omitted_bytes`` means that every struct has bytes in the file, which were not read.
    """
    kind = column.type
    if is_list(kind):
        flat = iter(_without_bytes(column.flatten(), omitted_bytes))
        lengths = pc.list_value_length(column).to_pylist()
        return [None if length is None else list(islice(flat, length)) for length in lengths]
    if pa.types.is_struct(kind):
        fields = {
            field.name: _without_bytes(column.field(index), omitted_bytes) for index, field in enumerate(kind)
        }
        if omitted_bytes:
            fields["bytes"] = [b""] * len(column)
        cells = (dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True))
        valid = column.is_valid().to_pylist()
        return [cell if is_valid else None for cell, is_valid in zip(cells, valid, strict=True)]
    if is_binary(kind):
        return [b"" if is_valid else None for is_valid in column.is_valid().to_pylist()]
    return _python(column)


def _python(column: pa.Array) -> list[Any]:
    """Python values. Text that is not UTF-8, which Parquet does not check, becomes empty bytes."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_python_value(value) for value in column]


def _python_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b""
