"""Sources of preference pairs: the format of the files at a URI, the columns to read, and the rows in order.

    parquet    as Pick-a-Pic and the Hugging Face hub store rows (images as bytes, paths, or
               struct<bytes, path>)
    arrow      what `datasets.save_to_disk` wrote
    jsonl      JSON lines with paths or URIs
    json       one JSON list of rows, as HPDv2 and ImageReward have it
    csv        a table with a header
    tar        webdataset tars
    folders    win/ and lose/ (or chosen/ and rejected/) with images of equal stems

Rows of any shape (row.py) may come in any format. Image paths are relative to the file that names them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, get_args

from pyarrow import fs

from services.api.requests import Column, DatasetSource
from services.errors import BadRequest, ServiceError, Unavailable
from services.pairs import splits
from services.pairs.column_types import ColumnMap, FileColumns, check_types
from services.pairs.columnar import IMAGE_COLUMNS, Format, Reader, Unit, Unreadable
from services.pairs.detection import detect
from services.pairs.images import MAX_FILE_BYTES, BadImage
from services.pairs.row import Row, Shape, bad_row, read_row
from services.storage import files, sources
from services.storage.sources import SourceRules

_ID: tuple[Column, ...] = ("has_label", "pair_id")
SHAPES: dict[Shape, tuple[tuple[Column, ...], tuple[Column, ...]]] = {
    "pair": (("jpg_0", "jpg_1", "label_0", "label_1", "caption"), ("image_0_uid", "image_1_uid", *_ID)),
    "chosen": (("chosen", "rejected", "caption"), ("chosen_uid", "rejected_uid", *_ID)),
    "ranking": (("images", "caption"), ("ranks", "scores", "image_uids", *_ID)),
}
"""The required and the optional columns of each shape."""
PATH_COLUMN_NAMES = ("{}_file_name", "{}_file_names")
"""How Hugging Face names columns of paths in an image folder's metadata."""
LAYOUTS: tuple[ColumnMap, ...] = (
    {"images": "image_path", "scores": "human_preference", "caption": "prompt"},
    {"images": "file_path", "scores": "human_preference", "caption": "prompt"},
    {"images": "image_path", "ranks": "rank", "caption": "prompt"},
    {"images": "generations", "ranks": "ranking", "caption": "prompt"},
)
"""Columns of published datasets: HPDv2's train.json (two names are in use) and test.json, and ImageReward."""
IMAGE_FOLDERS = ("", "{}", "{}_images")
"""Where the images of a published `train.json` may be: beside it, in `train/`, or in `train_images/`."""
_NO_FILE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)
_NO_FILE_S3_ERRORS = ("ACCESS_DENIED", "NO_SUCH_BUCKET")
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_ORDER = ("rank", "score", "prefer", "rating", "label", "vote", "reward", "order")
"""How a word begins in the name of a column that may say which image of a ranking is better."""


@dataclass(frozen=True)
class Source:
    """Rows at a URI. Small and picklable: nothing stays open between calls."""

    uri: str
    shape: Shape
    columns: ColumnMap
    unused_columns: tuple[str, ...]
    reader: Reader = field(repr=False)
    is_folder: bool = field(repr=False)
    split: str | None = None
    files_not_read: dict[str, int] = field(default_factory=dict)
    parts_missing: int = 0
    split_columns: tuple[str, ...] = ()
    """Columns that are not read and may say of which split a row is."""
    image_folder: str = ""
    """Where the images of a published dataset are, relative to the file that names them."""
    rules: SourceRules = field(default_factory=sources.rules, repr=False, compare=False)
    """What the process that opened the source may read."""
    unreachable_buckets: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Foreign buckets that did not answer; they are not requested again for every image."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A process that receives a source is held to the rules of the one that opened it."""
        self.__dict__.update(state)
        sources.hold_to(self.rules)

    @property
    def format(self) -> Format:
        return self.reader.format

    def units(self) -> Iterator[Unit]:
        """The units of the source in order; each can be read independently."""
        return self.reader.units()

    def rows(
        self, unit: Unit, *, with_images: bool = False, start: int = 0, stop: int | None = None
    ) -> Iterator[Row]:
        """Rows ``start`` to ``stop`` of a unit.

        Raises BadRequest where the unit's file lacks a column, OSError and pyarrow's errors where it is
        unreadable.
        """
        locate = partial(_relative_to_root, posixpath.join(posixpath.dirname(unit.file), self.image_folder))
        for row, cells in enumerate(self.reader.rows(unit, self.columns, with_images, start, stop), start):
            sources.check_time()
            key = f"{unit.file}:{unit.group}:{row}"
            if isinstance(cells, Unreadable):
                yield bad_row(key, cells.cause, detail=cells.detail)
            else:
                yield read_row(self.shape, key, cells, locate, with_images=with_images)

    def check_split_columns(self, units: Iterable[Unit], stop: int | None = None) -> None:
        """Raises BadRequest where a column says that rows ``..stop`` of the units are of several splits."""
        for column in self.split_columns:
            cells = (
                cell
                for unit in units
                for cell in self.reader.rows(unit, {"pair_id": column}, False, 0, stop)
                if not isinstance(cell, Unreadable)
            )
            splits.check_column(self.uri, column, sources.in_time(cell.get("pair_id") for cell in cells))

    def row_name(self, key: str) -> str:
        """A row's key with the name of its file, also where the dataset is one file."""
        return key if self.is_folder else posixpath.basename(self.uri) + key

    def load(self, image: bytes | str | None) -> bytes | None:
        """The bytes of a row's image, at most MAX_FILE_BYTES + 1 of them; None where the file does not exist.

        Raises BadImage for a path outside the dataset's folder and for a foreign bucket that is unreachable.
        Raises OSError or ServiceError where the dataset's own bucket or disk fails: the image may be good.
        """
        if not isinstance(image, str):
            return image
        own_filesystem, root = sources.resolve(self.uri)
        folder = root if self.is_folder else posixpath.dirname(root)
        filesystem, path = self._locate(image, own_filesystem, folder)
        try:
            if isinstance(filesystem, fs.LocalFileSystem) and not filesystem.get_file_info(path).is_file:
                return None  # a folder, or an endless device
            with filesystem.open_input_stream(path) as stream:
                return bytes(stream.read(MAX_FILE_BYTES + 1))
        except ValueError:  # a null byte in the path
            return None
        except OSError as error:
            if error.errno in _NO_FILE_ERRNOS or any(code in str(error) for code in _NO_FILE_S3_ERRORS):
                return None
            if _bucket(path) == _bucket(root):
                raise
            raise BadImage("image_unreachable", str(error)) from error

    def _locate(self, image: str, own_filesystem: fs.FileSystem, folder: str) -> tuple[fs.FileSystem, str]:
        """The filesystem and path of an image: an object's URI, or a file below the dataset's folder.

        Raises BadImage.
        """
        if "://" in image:
            filesystem, path = self._resolve(image)
            if not isinstance(filesystem, fs.LocalFileSystem):
                return filesystem, path
        else:
            filesystem, path = own_filesystem, posixpath.join(folder, image)
        inside = _inside(folder, path) if type(filesystem) is type(own_filesystem) else None
        if inside is None or not sources.is_allowed(filesystem, inside):
            raise BadImage("image_outside", f"not below {folder!r}")
        return filesystem, inside

    def _resolve(self, uri: str) -> tuple[fs.FileSystem, str]:
        """The filesystem and path of a row's URI.

        The dataset's own bucket is resolved already, so an error here is the row's: BadImage.
        """
        bucket = uri.split("/")[2]
        if bucket in self.unreachable_buckets:
            raise BadImage("image_unreachable", f"bucket {bucket!r} did not answer an earlier request")
        try:
            return sources.resolve(uri)
        except ServiceError as error:
            if error.code == sources.NOT_ALLOWED:
                raise BadImage("image_outside", str(error)) from error
            if isinstance(error, Unavailable) or error.code == "no_credentials":
                self.unreachable_buckets.add(bucket)
            raise BadImage("image_unreachable", str(error)) from error

    def fingerprint(self) -> bytes:
        """sha256 of the files' names, sizes and Parquet footers. Images in other files are not covered."""
        digest = hashlib.sha256()
        for part in self.reader.identity():
            digest.update(part)
        return digest.digest()


def _relative_to_root(folder: str, path: str) -> str:
    """An image's path relative to the dataset's folder; URIs and absolute paths stay."""
    return path if "://" in path else posixpath.normpath(posixpath.join(folder, path))


def _bucket(path: str) -> str:
    """The bucket of a path in an object store; "" for an absolute local path."""
    return path.partition("/")[0]


def _inside(folder: str, path: str) -> str | None:
    """The normalized path where it is inside the folder, by name or once links are followed; else None.

    Links are legitimate: the hub's cache links each file, and the folder may be reached through a link.
    """
    candidates = [(posixpath.normpath(folder), posixpath.normpath(path))]
    if folder.startswith("/") and "\0" not in path:
        candidates.append((os.path.realpath(folder), os.path.realpath(path)))
    for root, candidate in candidates:
        if PurePosixPath(candidate).is_relative_to(root):
            return candidate
    return None


def open_source(source: DatasetSource) -> Source:
    """Detect the format and the shape of a source and choose its columns.

    Raises BadRequest that names the URI or the column.
    """
    try:
        detected = detect(source.uri, source.split)
        reader = detected.reader
        file_columns = reader.columns()
    except UnicodeError as error:  # pyarrow's paths are text
        message = f"uri {source.uri!r} holds a file whose name is not UTF-8: rename it"
        raise BadRequest(message, param="uri", code="name_not_utf8") from error
    layout = _published_layout(file_columns, source.columns)
    shape, columns = choose_columns(source.uri, file_columns, layout or source.columns)
    check_types(source.uri, file_columns, columns)
    unused = tuple(name for name in file_columns if name not in columns.values())
    return Source(
        source.uri,
        shape,
        columns,
        unused,
        reader,
        detected.is_folder,
        detected.split,
        dict(sorted(detected.files_not_read.items())),
        detected.parts_missing,
        tuple(name for name in unused if splits.is_column(name, file_columns[name])),
        _image_folder(source.uri, reader, layout) if layout else "",
    )


def _published_layout(file_columns: FileColumns, mapped: ColumnMap) -> ColumnMap | None:
    """The columns of a published dataset, where the files have them and the request maps none differently."""
    if "caption" in file_columns:
        return None
    fitting = [
        layout
        for layout in LAYOUTS
        if file_columns.keys() >= set(layout.values()) and mapped.items() <= layout.items()
    ]
    return fitting[0] if len(fitting) == 1 else None


def _image_folder(uri: str, reader: Reader, layout: ColumnMap) -> str:
    """Where the first image of a published dataset is, relative to the file that names it."""
    unit = next(reader.units())
    cells = next(reader.rows(unit, layout, False, 0, 1), None)
    images = cells.get("images") if isinstance(cells, dict) else None
    image = str(images[0]) if isinstance(images, list) and images else "\0"
    stem = posixpath.basename(unit.file or uri).partition(".")[0]
    filesystem, path = sources.resolve(files.join(uri, unit.file) if unit.file else uri)
    for folder in (form.format(stem) for form in IMAGE_FOLDERS if "\0" not in image):
        inside = _inside(posixpath.dirname(path), posixpath.join(posixpath.dirname(path), folder, image))
        if inside is not None and filesystem.get_file_info(inside).is_file:
            return folder
    return ""


def choose_columns(uri: str, file_columns: FileColumns, mapped: ColumnMap) -> tuple[Shape, ColumnMap]:
    """The shape of the rows and the columns to read.

    ``mapped`` are the columns that the request names; one that is mapped to "" is not read. Raises BadRequest
    that lists the columns found.
    """
    omitted = {column for column, name in mapped.items() if not name}
    mapped = {column: name for column, name in mapped.items() if name}
    _check_mapping(uri, file_columns, mapped)
    usable: ColumnMap = {}
    for column in get_args(Column):
        name = mapped.get(column) or _name_in_files(column, file_columns)
        if name and column not in omitted:
            usable[column] = name
    lacking = {
        shape: [column for column in required if column not in usable]
        for shape, (required, _) in SHAPES.items()
    }
    complete = [shape for shape in SHAPES if not lacking[shape]]
    if not complete:
        message = f"uri {uri!r} lacks {_describe_lacking(lacking)}; found: {', '.join(file_columns)}"
        raise BadRequest(message, param="uri", code="missing_columns")
    shape = max(complete, key=lambda shape: len(mapped.keys() & _columns_of(shape)))
    unread = mapped.keys() - _columns_of(shape)
    if unread:
        message = f"columns.{min(unread)}: is not read beside {', '.join(SHAPES[shape][0])}"
        raise BadRequest(message, "columns")
    columns: ColumnMap = {column: name for column, name in usable.items() if column in _columns_of(shape)}
    if shape == "ranking" and not {"ranks", "scores"} & (columns.keys() | omitted):
        _check_no_order(uri, file_columns, columns)
    return shape, columns


def _check_no_order(uri: str, file_columns: FileColumns, columns: ColumnMap) -> None:
    """Refuse a column that may order the images, where the list itself would be taken as best first."""
    others = file_columns.keys() - columns.values() - set(get_args(Column))
    ordering = [
        name for name in others if any(word.lower().startswith(_ORDER) for word in _WORDS.findall(name))
    ]
    found = min(ordering, default="")
    if found:
        message = (
            f"uri {uri!r} has a column {found!r} that may say which image is better: map it with "
            f'ranks={found} (1 is the best) or scores={found} (more is better), or ranks= where "images" is '
            "best first"
        )
        raise BadRequest(message, param="columns", code="order_unclear")


def _check_mapping(uri: str, file_columns: FileColumns, mapped: ColumnMap) -> None:
    """Raises BadRequest for a name that the files lack, and for a name that is mapped twice."""
    for column, name in mapped.items():
        if name not in file_columns:
            message = (
                f"columns.{column}: uri {uri!r} has no column {name!r}; found: {', '.join(file_columns)}"
            )
            raise BadRequest(message, "columns", "missing_columns")
    repeated = [name for name, count in Counter(mapped.values()).items() if count > 1]
    if repeated:
        raise BadRequest(f"columns: {', '.join(repeated)} is read for two columns", "columns")


def _describe_lacking(lacking: dict[Shape, list[Column]]) -> str:
    """What the nearest shape still needs; every shape, where the files have a caption at most."""
    nearest = min(SHAPES, key=lambda shape: len(lacking[shape]) / len(SHAPES[shape][0]))
    present = set(SHAPES[nearest][0]) - set(lacking[nearest])
    if present - {"caption"}:
        return f"the columns {', '.join(lacking[nearest])}"
    every_shape = " or ".join(", ".join(required) for required, _ in SHAPES.values())
    return f"columns that can be read ({every_shape})"


def _columns_of(shape: Shape) -> set[Column]:
    required, optional = SHAPES[shape]
    return {*required, *optional}


def _name_in_files(column: Column, file_columns: FileColumns) -> str | None:
    """The column's own name, or Hugging Face's for a column of paths; None where the files have neither."""
    names = [str(column)]
    if column in IMAGE_COLUMNS:
        names += [form.format(column) for form in PATH_COLUMN_NAMES]
    return next((name for name in names if name in file_columns), None)
