"""Sources of preference pairs: the format of the files at a URI, the columns to read, and the rows in order.

    parquet    a file or a folder of files, as Pick-a-Pic and the Hugging Face hub store them (images as
               bytes, paths, or struct<bytes, path>), or `metadata.parquet` of an image folder
    arrow      a folder that `datasets.save_to_disk` wrote
    jsonl      a file or a folder of JSON lines with paths or URIs, or `metadata.jsonl` of an image folder
    folders    win/ and lose/ (or chosen/ and rejected/) with images of equal stems

Rows of any shape (row.py) may come in any format. Image paths are relative to the file that names them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, get_args

from pyarrow import fs

from services.api.requests import Column, DatasetSource
from services.errors import BadRequest, NotFound, ServiceError, Unavailable
from services.pairs.column_types import ColumnMap, FileColumns, check_types
from services.pairs.columnar import IMAGE_COLUMNS, ArrowFiles, Format, ParquetFiles, Reader, Unit
from services.pairs.images import MAX_FILE_BYTES, BadImage
from services.pairs.path_based import SIDES, JsonLines, WinLose
from services.pairs.row import Row, Shape, bad_row, read_row
from services.storage import files, sources
from services.storage.sources import SourceRules

_ID: tuple[Column, ...] = ("has_label", "pair_id")
SHAPES: dict[Shape, tuple[tuple[Column, ...], tuple[Column, ...]]] = {
    "pair": (("jpg_0", "jpg_1", "label_0", "label_1", "caption"), ("image_0_uid", "image_1_uid", *_ID)),
    "chosen": (("chosen", "rejected", "caption"), ("chosen_uid", "rejected_uid", *_ID)),
    "ranking": (("images", "caption"), ("ranks", "image_uids", *_ID)),
}
"""The required and the optional columns of each shape."""
PATH_COLUMN_NAMES = ("{}_file_name", "{}_file_names")
"""How Hugging Face names columns of paths in an image folder's metadata."""
JSON_LINES = (".jsonl", ".ndjson")
FOLDER_READERS: tuple[tuple[Callable[[str, tuple[str, ...]], Reader], tuple[str, ...]], ...] = (
    (ParquetFiles, (".parquet",)),
    (JsonLines, JSON_LINES),
    (ArrowFiles, (".arrow",)),
)
_NO_FILE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)
_NO_FILE_S3_ERRORS = ("ACCESS_DENIED", "NO_SUCH_BUCKET")
_SPLIT_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")


@dataclass(frozen=True)
class Source:
    """Rows at a URI. Small and picklable: nothing stays open between calls."""

    uri: str
    shape: Shape
    columns: ColumnMap
    unused_columns: tuple[str, ...]
    reader: Reader = field(repr=False)
    is_folder: bool = field(repr=False)
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
        locate = partial(_relative_to_root, posixpath.dirname(unit.file))
        for row, cells in enumerate(self.reader.rows(unit, self.columns, with_images, start, stop), start):
            sources.check_time()
            key = f"{unit.file}:{unit.group}:{row}"
            if isinstance(cells, str):
                yield bad_row(key, cells)
            else:
                yield read_row(self.shape, key, cells, locate, with_images=with_images)

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
    reader, is_folder = _reader(source.uri)
    file_columns = reader.columns()
    shape, columns = choose_columns(source.uri, file_columns, source.columns)
    check_types(source.uri, file_columns, columns)
    unused = tuple(name for name in file_columns if name not in columns.values())
    return Source(source.uri, shape, columns, unused, reader, is_folder)


def _reader(uri: str) -> tuple[Reader, bool]:
    """The reader for the files at a URI, and whether the URI is a folder."""
    filesystem, path = sources.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        raise NotFound(f"uri {uri!r} does not exist", param="uri")
    if kind == fs.FileType.Directory:
        return _folder_reader(uri), True
    if path.endswith(JSON_LINES):
        return JsonLines(uri, ("",)), False
    if path.endswith(".arrow"):
        return ArrowFiles(uri, ("",)), False
    return ParquetFiles(uri, ("",)), False


def _folder_reader(uri: str) -> Reader:
    entries = {info.base_name for info in sources.entries(uri)}
    if "dataset_dict.json" in entries:
        splits = ", ".join(_read_json(files.join(uri, "dataset_dict.json")).get("splits", []))
        message = f"uri {uri!r} holds several splits, name the folder of one of them: {splits}"
        raise BadRequest(message, param="uri", code="splits")
    if "state.json" in entries:
        return ArrowFiles(uri, _saved_files(uri))
    if "metadata.jsonl" in entries:
        return JsonLines(uri, ("metadata.jsonl",))
    for sides in SIDES:
        if entries.issuperset(sides):
            return WinLose(uri, sides)
    all_names = sources.list_files(uri)
    visible = [name for name in all_names if not name.startswith(".") and "/." not in name]
    for reader, suffixes in FOLDER_READERS:
        names = tuple(name for name in visible if name.endswith(suffixes))
        if names:
            return reader(uri, _one_split(uri, names))
    message = f"uri {uri!r} holds no .parquet file, no JSON lines, no .arrow file and no win and lose folders"
    raise BadRequest(message, param="uri")


def _read_json(uri: str) -> Any:
    return json.loads(sources.read_bytes(uri, sources.MAX_JSON_BYTES))


def _saved_files(uri: str) -> tuple[str, ...]:
    """The Arrow files of `save_to_disk`, in the order of its state.json. Raises BadRequest."""
    try:
        entries = _read_json(files.join(uri, "state.json"))["_data_files"]
        names = tuple(str(entry["filename"]) for entry in entries)
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"uri {uri!r} has a state.json that names no data files", param="uri") from error
    if not names or any("/" in name for name in names):
        message = f"uri {uri!r} has a state.json with unusable data files: {list(names)}"
        raise BadRequest(message, param="uri")
    return names


def _one_split(uri: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The files to read: of several splits only `train`, by the hub's names `train-00000-of-00003.parquet`.

    Raises BadRequest.
    """
    split_of: dict[str, str] = {}
    for name in names:
        match = _SPLIT_FILE.fullmatch(posixpath.basename(name))
        if match:
            split_of[name] = match[1]
    splits = sorted(set(split_of.values()))
    if len(splits) < 2:
        return names
    if "train" not in splits:
        message = f"uri {uri!r} holds several splits and none is called train: {', '.join(splits)}"
        raise BadRequest(message, param="uri", code="splits")
    return tuple(name for name in names if split_of.get(name, "train") == "train")


def choose_columns(uri: str, file_columns: FileColumns, mapped: ColumnMap) -> tuple[Shape, ColumnMap]:
    """The shape of the rows and the columns to read.

    ``mapped`` are the columns that the request names. Raises BadRequest that lists the columns found.
    """
    _check_mapping(uri, file_columns, mapped)
    usable: ColumnMap = {}
    for column in get_args(Column):
        name = mapped.get(column) or _name_in_files(column, file_columns)
        if name:
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
    return shape, {column: name for column, name in usable.items() if column in _columns_of(shape)}


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
