"""Sources of preference pairs: which kind of files lie at a URI, which of their columns are read, and their rows in order.

    parquet    a file or a folder of them, as Pick-a-Pic and the Hugging Face hub have them (images as bytes, paths, or
               struct<bytes, path>), or `metadata.parquet` of an image folder
    arrow      a folder that `datasets.save_to_disk` wrote
    jsonl      a file or a folder of JSON lines with paths or URIs, `metadata.jsonl` of an image folder among them
    folders    win/ and lose/ (or chosen/ and rejected/) with images of equal stems

Any shape of rows (services/pairs/row.py) may come in any of them. Paths of images are relative to the file that names them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import get_args

from pyarrow import fs

from services.api.requests import Column, DatasetSource
from services.errors import BadRequest, ServiceError, Unavailable
from services.pairs.column_types import Columns, Found, check_types
from services.pairs.columnar import IMAGE_COLUMNS, ArrowFiles, Format, ParquetFiles, Reader, Unit
from services.pairs.images import MAX_FILE_BYTES, BadImage
from services.pairs.path_based import SIDES, JsonLines, WinLose
from services.pairs.row import Row, Shape, bad_row, read_row
from services.storage import files

__all__ = ["Source", "Unit", "open_source"]

_ID: tuple[Column, ...] = ("has_label", "pair_id")
SHAPES: dict[Shape, tuple[tuple[Column, ...], tuple[Column, ...]]] = {
    "pair": (("jpg_0", "jpg_1", "label_0", "label_1", "caption"), ("image_0_uid", "image_1_uid", *_ID)),
    "chosen": (("chosen", "rejected", "caption"), ("chosen_uid", "rejected_uid", *_ID)),
    "ranking": (("images", "caption"), ("ranks", "image_uids", *_ID)),
}
"""What a row of each shape needs, and what else is read where it is there."""
ALSO_CALLED = ("{}_file_name", "{}_file_names")
"""Hugging Face's names for columns of paths in an image folder's metadata."""
JSON_LINES = (".jsonl", ".ndjson")
FOLDERS_OF: tuple[tuple[Callable[[str, tuple[str, ...]], Reader], tuple[str, ...]], ...] = (
    (ParquetFiles, (".parquet",)),
    (JsonLines, JSON_LINES),
    (ArrowFiles, (".arrow",)),
)
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)
_REFUSED = ("ACCESS_DENIED", "NO_SUCH_BUCKET")
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")


@dataclass(frozen=True)
class Source:
    """Rows at a URI. Small and picklable: nothing is open between calls. ``columns`` maps what is read to the files' names."""

    uri: str
    shape: Shape
    columns: Columns
    not_read: tuple[str, ...]
    reader: Reader = field(repr=False)
    is_folder: bool = field(repr=False)
    gone: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Buckets of others that did not answer: they are not asked again for every image."""

    @property
    def format(self) -> Format:
        return self.reader.format

    def units(self) -> Iterator[Unit]:
        """The source in order, in stretches that can be read apart from each other."""
        return self.reader.units()

    def rows(
        self, unit: Unit, *, with_images: bool = False, start: int = 0, stop: int | None = None
    ) -> Iterator[Row]:
        """Rows ``start`` to ``stop`` of a unit. Raises BadRequest where its file has lost a column, OSError and
        pyarrow's errors where it cannot be read."""
        locate = partial(_from_root, posixpath.dirname(unit.file))
        for row, cells in enumerate(self.reader.rows(unit, self.columns, with_images, start, stop), start):
            key = f"{unit.file}:{unit.group}:{row}"
            yield (
                bad_row(key, cells)
                if isinstance(cells, str)
                else read_row(self.shape, key, cells, locate, with_images=with_images)
            )

    def load(self, image: bytes | str | None) -> bytes | None:
        """The bytes of a row's image, at most MAX_FILE_BYTES + 1 of them; None where there is no such file. Raises BadImage
        for a path that leads out of the dataset's folder, and where a place that is not the dataset's cannot be reached. Raises
        OSError or ServiceError where the dataset's own bucket or disk fails: that says nothing of the image."""
        if not isinstance(image, str):
            return image
        own, root = files.resolve(self.uri)
        filesystem, path = self._place(image, own, root if self.is_folder else posixpath.dirname(root))
        try:
            if isinstance(filesystem, fs.LocalFileSystem) and not filesystem.get_file_info(path).is_file:
                return None  # a folder, or a device that never ends
            with filesystem.open_input_stream(path) as stream:
                return stream.read(MAX_FILE_BYTES + 1)
        except ValueError:  # a null byte
            return None
        except OSError as error:
            if error.errno in _NO_SUCH_FILE or any(word in str(error) for word in _REFUSED):
                return None
            if _bucket(path) == _bucket(root):
                raise
            raise BadImage("image_unreachable", str(error)) from error

    def _place(self, image: str, own: fs.FileSystem, folder: str) -> tuple[fs.FileSystem, str]:
        """Where an image lies: below the dataset's folder, or at the URI of an object. Raises BadImage."""
        filesystem, path = self._resolve(image) if "://" in image else (own, posixpath.join(folder, image))
        if "://" in image and not isinstance(filesystem, fs.LocalFileSystem):
            return filesystem, path
        below = _below(folder, path) if type(filesystem) is type(own) else None
        if below is None:
            raise BadImage("image_outside", f"not below {folder!r}")
        return filesystem, below

    def _resolve(self, uri: str) -> tuple[fs.FileSystem, str]:
        """The place of a URI in a row. The dataset's own bucket was resolved before: what fails here is the row's."""
        bucket = uri.split("/")[2]
        if bucket in self.gone:
            raise BadImage("image_unreachable", f"bucket {bucket!r} did not answer before")
        try:
            return files.resolve(uri)
        except ServiceError as error:
            if isinstance(error, Unavailable) or error.code == "no_credentials":
                self.gone.add(bucket)
            raise BadImage("image_unreachable", str(error)) from error

    def fingerprint(self) -> bytes:
        """sha256 of the files' names and sizes, and of Parquet footers. Images outside of the files are not looked at."""
        digest = hashlib.sha256()
        for part in self.reader.identity():
            digest.update(part)
        return digest.digest()


def _from_root(folder: str, path: str) -> str:
    """An image's path from the dataset's folder; URIs and absolute paths stay."""
    return path if "://" in path else posixpath.normpath(posixpath.join(folder, path))


def _bucket(path: str) -> str:
    """The bucket of a path in an object store, "" of an absolute local path."""
    return path.partition("/")[0]


def _below(folder: str, path: str) -> str | None:
    """The path without "..", where it stays below the folder by its name, or once links are followed: a folder's files may be
    links (the hub's cache), and so may what leads to it."""
    names = [(posixpath.normpath(folder), posixpath.normpath(path))]
    if folder.startswith("/") and "\0" not in path:
        names.append((os.path.realpath(folder), os.path.realpath(path)))
    return next((place for root, place in names if PurePosixPath(place).is_relative_to(root)), None)


def open_source(source: DatasetSource) -> Source:
    """Tell what lies at the URI and what of it is read. Raises BadRequest that names the URI or the column."""
    reader, is_folder = _reader(source.uri)
    found = reader.columns()
    shape, columns = choose_columns(source.uri, found, source.columns)
    check_types(source.uri, found, columns)
    not_read = tuple(name for name in found if name not in columns.values())
    return Source(source.uri, shape, columns, not_read, reader, is_folder)


def _reader(uri: str) -> tuple[Reader, bool]:
    """What reads the files at a URI, and whether it is a folder."""
    filesystem, path = files.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        raise BadRequest(f"uri {uri!r} does not exist", param="uri", code="not_found")
    if kind == fs.FileType.Directory:
        return _folder_reader(uri), True
    if path.endswith(JSON_LINES):
        return JsonLines(uri, ("",)), False
    return ArrowFiles(uri, ("",)) if path.endswith(".arrow") else ParquetFiles(uri, ("",)), False


def _folder_reader(uri: str) -> Reader:
    filesystem, path = files.resolve(uri)
    top = {info.base_name for info in filesystem.get_file_info(fs.FileSelector(path))}
    if "dataset_dict.json" in top:
        splits = ", ".join(files.read_json(files.join(uri, "dataset_dict.json")).get("splits", []))
        raise BadRequest(
            f"uri {uri!r} holds several splits, name the folder of one of them: {splits}",
            param="uri",
            code="splits",
        )
    if "state.json" in top:
        return ArrowFiles(uri, _saved_files(uri))
    if "metadata.jsonl" in top:
        return JsonLines(uri, ("metadata.jsonl",))
    for sides in SIDES:
        if top.issuperset(sides):
            return WinLose(uri, sides)
    names = [
        name
        for name in files.list_files(uri, recursive=True)
        if not name.startswith(".") and "/." not in name
    ]
    for reader, suffixes in FOLDERS_OF:
        if paths := tuple(name for name in names if name.endswith(suffixes)):
            return reader(uri, _of_one_split(uri, paths))
    raise BadRequest(
        f"uri {uri!r} holds no .parquet file, no JSON lines, no .arrow file and no win and lose folders",
        param="uri",
    )


def _saved_files(uri: str) -> tuple[str, ...]:
    """The Arrow files of `save_to_disk`, in the order of its state. Raises BadRequest."""
    try:
        paths = tuple(
            str(entry["filename"]) for entry in files.read_json(files.join(uri, "state.json"))["_data_files"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"uri {uri!r} has a state.json that names no data files", param="uri") from error
    if not paths or any("/" in name for name in paths):
        raise BadRequest(f"uri {uri!r} has a state.json whose data files are {list(paths)}", param="uri")
    return paths


def _of_one_split(uri: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    """The hub names files `train-00000-of-00003.parquet`: of several splits only `train` is for training. Raises BadRequest."""
    named = {name: match[1] for name in paths if (match := _SPLIT.fullmatch(posixpath.basename(name)))}
    splits = sorted(set(named.values()))
    if len(splits) < 2:
        return paths
    if "train" not in splits:
        message = f"uri {uri!r} holds several splits and none is called train: {', '.join(splits)}"
        raise BadRequest(message, param="uri", code="splits")
    return tuple(name for name in paths if named.get(name, "train") == "train")


def choose_columns(uri: str, found: Found, mapped: Columns) -> tuple[Shape, Columns]:
    """The shape of the rows and what is read of the files. Raises BadRequest that names what was found."""
    there = ", ".join(found)
    for name, own in mapped.items():
        if own not in found:
            raise BadRequest(
                f"columns.{name}: uri {uri!r} has no column {own!r}; found: {there}",
                "columns",
                "missing_columns",
            )
    if twice := [own for own, count in Counter(mapped.values()).items() if count > 1]:
        raise BadRequest(f"columns: {', '.join(twice)} is read for two columns", "columns")
    usable: Columns = {
        name: read for name in get_args(Column) if (read := mapped.get(name) or _own_name(name, found))
    }
    lacking = {
        shape: [name for name in needed if name not in usable] for shape, (needed, _) in SHAPES.items()
    }
    whole = [shape for shape in SHAPES if not lacking[shape]]
    if not whole:
        raise BadRequest(
            f"uri {uri!r} lacks {_lacks(lacking)}; found: {there}", param="uri", code="missing_columns"
        )
    chosen = max(whole, key=lambda shape: len(mapped.keys() & _read_of(shape)))
    if unread := mapped.keys() - _read_of(chosen):
        raise BadRequest(
            f"columns.{min(unread)}: is not read beside {', '.join(SHAPES[chosen][0])}", "columns"
        )
    return chosen, {name: own for name, own in usable.items() if name in _read_of(chosen)}


def _lacks(lacking: dict[Shape, list[Column]]) -> str:
    """What the nearest shape of rows still needs; where nothing but a caption is there, every shape."""
    nearest = min(SHAPES, key=lambda shape: len(lacking[shape]) / len(SHAPES[shape][0]))
    if set(SHAPES[nearest][0]) - set(lacking[nearest]) - {"caption"}:
        return f"the columns {', '.join(lacking[nearest])}"
    return f"columns that can be read ({' or '.join(', '.join(needed) for needed, _ in SHAPES.values())})"


def _read_of(shape: Shape) -> set[Column]:
    needed, optional = SHAPES[shape]
    return {*needed, *optional}


def _own_name(name: Column, found: Found) -> str | None:
    called = [str(name), *(form.format(name) for form in ALSO_CALLED if name in IMAGE_COLUMNS)]
    return next((own for own in called if own in found), None)
