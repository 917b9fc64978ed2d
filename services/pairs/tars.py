"""Reader of webdataset tars: the files of a row share a name and differ in their suffixes.

    000017.jpg_0  000017.jpg_1  000017.json        an image in each column, the other columns in JSON
    000017.chosen.png  000017.rejected.png  000017.txt

A file's column is its suffix without that of its image format; ``.txt`` and ``.caption`` hold the caption,
and the keys of ``.json`` are columns. A tar is a unit. Memory holds one row.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, BinaryIO, cast

import pyarrow as pa

from services.errors import BadRequest
from services.pairs.column_types import ColumnMap, FileColumns
from services.pairs.columnar import (
    IMAGE_COLUMNS,
    Cells,
    Format,
    Unit,
    Unreadable,
    WholeFiles,
    compression_of,
    full_uri,
    open_decompressed,
    open_file,
    unreadable,
)
from services.pairs.documents import cell_of
from services.pairs.images import MAX_FILE_BYTES
from services.pairs.path_based import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_LINE_BYTES,
    json_type,
    keys_of,
    why_broken,
)

BLOCK_BYTES = 512
MAX_END_BYTES = 1 << 20
"""Zeros that may follow the last file."""
ROWS_FOR_COLUMNS = 20


@dataclass(frozen=True)
class Tars(WholeFiles):
    """Webdataset tars, plain or compressed. A plain one is passed over without reading its images."""

    format: Format = "tar"

    def columns(self) -> FileColumns:
        """The columns of the first rows. Raises BadRequest where there is none."""
        rows = (row for file in self.files for row in self._rows(file, {}, with_images=False))
        return keys_of(
            self.uri, islice(rows, ROWS_FOR_COLUMNS), "holds no files of webdataset rows", "not_tar"
        )

    def rows(
        self, unit: Unit, columns: ColumnMap, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | Unreadable]:
        for row in islice(self._rows(unit.file, columns, with_images=with_images), start, stop):
            if isinstance(row, Unreadable):
                yield row
            else:
                yield {column: row.get(name) for column, name in columns.items()}

    def _rows(
        self, file: str, columns: ColumnMap, *, with_images: bool
    ) -> Iterator[dict[str, Any] | Unreadable]:
        """The rows by the names in the files. Raises BadRequest where the tar is broken or cut off."""
        column_of = {name: column for column, name in columns.items()}
        with self._open(file) as (tar, check_end):
            members = (member for member in _members(tar) if member.isfile() and _suffix(member.name))
            for _, group in groupby(members, key=lambda member: _key(member.name)):
                yield _row(tar, group, column_of, with_images)
            check_end()

    @contextmanager
    def _open(self, file: str) -> Iterator[tuple[tarfile.TarFile, Callable[[], None]]]:
        """A tar, and a check that it ended where its files do."""
        uri = full_uri(self.uri, file)
        try:
            with open_file(self.uri, file) as stream:
                if not compression_of(stream):
                    with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:") as tar:
                        yield tar, lambda: _check_end(uri, stream, tar.offset)
                    return
            with open_decompressed(self.uri, file) as reader, tarfile.open(fileobj=reader, mode="r|") as tar:
                yield tar, lambda: None
        except tarfile.TarError as error:
            raise unreadable(error, uri, "is not a complete tar", "not_tar") from error


def _check_end(uri: str, stream: pa.NativeFile, offset: int) -> None:
    """Refuse a tar without zeros at its end: tarfile ends silently at a broken header and where it is cut."""
    rest = stream.size() - offset
    end = stream.read_at(min(rest, MAX_END_BYTES), offset)
    if len(end) < BLOCK_BYTES or any(end) or rest > MAX_END_BYTES:
        where = f"byte {offset:,} of {offset + rest:,}"
        message = f"uri {uri!r} is not a complete tar: it is broken or cut off at {where}"
        raise BadRequest(message, param="uri", code="not_tar")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in order. tarfile would keep every one of them in memory."""
    while (member := tar.next()) is not None:
        yield member
        tar.members = []  # type: ignore[attr-defined]  # not in the types


def _key(name: str) -> str:
    """A member's path up to the first dot of its file name: what the files of a row share."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _suffix(name: str) -> str:
    """What follows the first dot of a member's file name, without its image format; "" for hidden files."""
    base = posixpath.basename(name)
    suffix = "" if base.startswith(".") else base.partition(".")[2].lower()
    stem, image_format = posixpath.splitext(suffix)
    return stem if image_format in IMAGE_SUFFIXES else suffix


def _row(
    tar: tarfile.TarFile, members: Iterator[tarfile.TarInfo], column_of: Mapping[str, str], with_images: bool
) -> dict[str, Any] | Unreadable:
    """The columns of a row by their names in the files. Without images, empty bytes stand for an image's."""
    cells: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    bad: Unreadable | None = None
    for member in members:
        name = "caption" if f".{_suffix(member.name)}" in CAPTION_SUFFIXES else _suffix(member.name)
        column = column_of.get(name, "")
        if name in cells:
            bad = Unreadable("member_twice", f"{member.name}: the row has {name} twice")
        elif name == "json":
            value = _json(_content(tar, member, MAX_LINE_BYTES))
            metadata = value if isinstance(value, dict) else {}
            bad = bad if isinstance(value, dict) else Unreadable("json_broken", f"{member.name}: {value}")
        elif column in IMAGE_COLUMNS:
            cells[name] = _content(tar, member, MAX_FILE_BYTES + 1) if with_images else b""
        elif column:
            text = _content(tar, member, MAX_LINE_BYTES).decode("utf-8-sig", errors="surrogateescape")
            cells[name] = cell_of(column, text.strip())
        else:
            cells[name] = None
    return bad or metadata | cells


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    """At most so many bytes of a member."""
    file = tar.extractfile(member)
    return file.read(most) if file else b""


def _json(content: bytes) -> dict[str, Any] | str:
    """A JSON object, or why it is none."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        return "nested too deeply"
    except ValueError as error:
        return why_broken(error)
    return value if isinstance(value, dict) else f"is {json_type(value)}, must be an object"
