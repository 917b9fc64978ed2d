"""Files by URI: ``file:///...`` or a plain path, and ``s3://bucket/...`` (services/storage/s3.py). Names are quoted in URIs.

Nothing half-written is visible: a local file is written beside its place, brought to the disk and renamed; an object is
there once its upload is complete. Raises FileNotFoundError where there is nothing, BadRequest for a URI, bucket or
credentials that cannot be used, Unavailable where the object store does not answer; all name the URI.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyarrow import fs

from services.errors import BadRequest
from services.storage import s3

PART = ".part"
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI, which can be pickled, and the path on it: for ranges of files and for Ray Train.

    Whole files are read and written by the functions below. Raises BadRequest for schemes other than file and s3.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    if _is_object(uri):
        return s3.resolve(uri)
    if not uri.startswith("file://"):
        raise BadRequest(f"uri {uri!r} cannot be opened: its scheme is neither file nor s3", param="uri")
    try:
        return fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise BadRequest(f"uri {uri!r} cannot be opened: {error}", param="uri") from error


def join(uri: str, *parts: str) -> str:
    """``uri/part/part``; the parts are plain names, and are quoted where ``uri`` is a URI."""
    return "/".join([uri.rstrip("/"), *(quote(part) if "://" in uri else part for part in parts)])


def as_uri(path: Path | str) -> str:
    """The file:// URI of a local path; a URI stays as it is."""
    return str(path) if "://" in str(path) else Path(path).expanduser().resolve().as_uri()


def local_path(uri: str) -> Path | None:
    """The path of a local URI; None for an object store's."""
    return None if _is_object(uri) else _local(uri)


def exists(uri: str) -> bool:
    """Is there a file or folder?"""
    return s3.exists(uri) if _is_object(uri) else _local(uri).exists()


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    return s3.read(uri) if _is_object(uri) else _local(uri).read_bytes()


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file that appears whole or not at all, replacing what was there."""
    if _is_object(uri):
        s3.write(uri, data)
    else:
        _put(_local(uri), lambda beside: beside.write_bytes(data))


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file where there is none, and say whether it was so, also where the same data come again after an error. Of
    several who try at once, one does. An object store must know conditional writes (If-None-Match). On file systems without
    hard links the file is written in its place, so a reader may see a part of it, which a writer that is killed leaves.
    """
    if _is_object(uri):
        return s3.create(uri, data)
    try:
        _put(_local(uri), lambda beside: beside.write_bytes(data), place=_link)
    except FileExistsError:
        return _local(uri).read_bytes() == data
    return True


def upload(path: Path, uri: str) -> None:
    """Copy a local file of any size to its place, where it appears whole or not at all."""
    if _is_object(uri):
        s3.upload(path, uri)
    else:
        _put(_local(uri), partial(shutil.copyfile, path))


def read_json(uri: str) -> Any:
    """A JSON file. Raises ValueError for one that is not JSON."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_bytes(uri, json.dumps(value, indent=1, sort_keys=True).encode())


def list_files(uri: str, *, recursive: bool = False) -> list[str]:
    """Paths below a folder, relative to it, sorted; empty where there is no such folder."""
    if _is_object(uri):
        names = [key for key in s3.keys(uri, recursive=recursive) if key and not key.endswith("/")]
    else:
        filesystem, path = resolve(uri)
        infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
        names = [info.path[len(path) :].lstrip("/") for info in infos if info.type == fs.FileType.File]
    return sorted(name for name in names if not name.endswith(PART))


def copy_folder(source_uri: str, target_uri: str) -> None:
    """Copy every file below one folder to another; each appears whole or not at all."""
    names = list_files(source_uri, recursive=True)
    if not names:
        raise FileNotFoundError(errno.ENOENT, "no files to copy", source_uri)
    for name in names:
        source, target = join(source_uri, *name.split("/")), join(target_uri, *name.split("/"))
        if not _is_object(source):
            upload(_local(source), target)
        elif _is_object(target):
            s3.copy(source, target)
        else:
            _put(_local(target), partial(s3.download, source))


def persist(folder: Path, uri: str) -> None:
    """Make a local folder durable at a URI: upload it, or sync it to disk if it is already there."""
    if local_path(uri) != folder:
        return copy_folder(as_uri(folder), uri)
    for file in folder.rglob("*"):
        if file.is_file():
            _sync(file)


def folder_bytes(uri: str) -> int:
    """The size of all files below a folder together."""
    if _is_object(uri):
        return s3.bytes_below(uri)
    return sum(file.stat().st_size for file in _local(uri).rglob("*") if file.is_file())


def delete_file(uri: str) -> None:
    """Delete a file; nothing where there is none."""
    if _is_object(uri):
        s3.delete(uri)
    else:
        _local(uri).unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Delete a folder and all below it; nothing where there is none."""
    if _is_object(uri):
        s3.delete_below(uri)
    elif (path := _local(uri)).is_dir():
        shutil.rmtree(path)


def _is_object(uri: str) -> bool:
    return uri.startswith(s3.SCHEME)


def _local(uri: str) -> Path:
    return Path(resolve(uri)[1])


def _put(path: Path, write: Callable[[Path], Any], place: Callable[[Path, Path], Any] = os.replace) -> None:
    """Let ``write`` make a file beside the place, and bring it there by ``place`` once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        write(beside)
        _sync(beside)
        place(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _link(beside: Path, path: Path) -> None:
    """Raises FileExistsError where there is a file."""
    try:
        return os.link(beside, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
    with path.open("xb") as file:
        try:
            file.write(beside.read_bytes())
            file.flush()
            os.fsync(file.fileno())
        except BaseException:  # a full disk: the place is free again
            path.unlink()
            raise


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
