"""Files by URI: ``file:///...`` or a plain path, ``s3://bucket/...`` (services/storage/s3.py), and
``shapes://...`` for the files of the shapes world that this process's installation ships.

Names are percent-encoded in URIs. Readers never see a partial file: a local file is written under a temporary
name, synced to disk and renamed; an object becomes visible when its upload is complete.

Raises FileNotFoundError if the file does not exist, BadRequest for an unusable URI, bucket or credentials,
and Unavailable if the object store does not answer. All three name the URI.
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
from urllib.parse import quote, unquote

from pyarrow import fs

from dde_core import shapes
from services.errors import BadRequest, NotFound
from services.storage import s3

SCHEMES = ("file", "s3", "shapes")
"""What a URI may begin with."""
PART = ".part"
SHIPPED = os.path.realpath(Path(shapes.__file__).parent)
"""The folder of what the package ships: the shapes world's model, pairs and prompts."""
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """A picklable filesystem and the path on it, for Ray Train and for reading ranges of files.

    Use the functions below for whole files. Raises BadRequest for schemes other than file, s3 and shapes.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), str(_absolute(uri))
    if _is_object(uri):
        return s3.resolve(uri)
    if uri.startswith(shapes.SCHEME):
        return fs.LocalFileSystem(), _shipped(uri)
    if not uri.startswith("file://"):
        raise BadRequest(f"uri {uri!r} cannot be opened: use a path, file:// or s3://", param="uri")
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise BadRequest(f"uri {uri!r} cannot be opened: {error}", param="uri") from error
    return filesystem, path


def join(uri: str, *parts: str) -> str:
    """``uri/part/part``. The parts are plain names; they are percent-encoded if ``uri`` is a URI."""
    names = [quote(part) for part in parts] if "://" in uri else parts
    return "/".join([uri.rstrip("/"), *names])


def as_uri(path: Path | str) -> str:
    """The file:// URI of a local path; a URI is returned unchanged."""
    if "://" in str(path):
        return str(path)
    return _absolute(path).as_uri()


def local_path(uri: str) -> Path | None:
    """The path of a local URI; None for a URI of an object store."""
    return None if _is_object(uri) else _local(uri)


def exists(uri: str) -> bool:
    """Whether the file or folder exists."""
    return s3.exists(uri) if _is_object(uri) else _local(uri).exists()


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    return s3.read(uri) if _is_object(uri) else _local(uri).read_bytes()


def write_bytes(uri: str, data: bytes) -> None:
    """Create or replace a file atomically."""
    if _is_object(uri):
        s3.write(uri, data)
    else:
        _put(_local(uri), lambda part: part.write_bytes(data))


def create_bytes(uri: str, data: bytes) -> bool:
    """Create a file unless it exists. Returns whether the file now holds ``data``, so a retry also succeeds.

    One of several concurrent writers succeeds. An object store must support conditional writes
    (If-None-Match). Without hard links, a file system makes this not atomic: a reader may see a partial
    file, and a writer that is killed leaves one.
    """
    if _is_object(uri):
        return s3.create(uri, data)
    try:
        _put(_local(uri), lambda part: part.write_bytes(data), publish=_link)
    except FileExistsError:
        return _local(uri).read_bytes() == data
    return True


def upload(path: Path, uri: str) -> None:
    """Create or replace a file atomically with the contents of a local file of any size."""
    if _is_object(uri):
        s3.upload(path, uri)
    else:
        _put(_local(uri), partial(shutil.copyfile, path))


def read_json(uri: str) -> Any:
    """The contents of a JSON file. Raises ValueError for invalid JSON."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Create or replace a JSON file atomically."""
    write_bytes(uri, json.dumps(value, indent=1, sort_keys=True).encode())


def list_files(uri: str, *, recursive: bool = False) -> list[str]:
    """Sorted paths of the files in a folder, relative to it; empty if the folder does not exist."""
    if _is_object(uri):
        names = [key for key in s3.keys(uri, recursive=recursive) if key and not key.endswith("/")]
    else:
        filesystem, path = resolve(uri)
        infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
        names = [info.path[len(path) :].lstrip("/") for info in infos if info.type == fs.FileType.File]
    return sorted(name for name in names if not name.endswith(PART))


def copy_folder(source_uri: str, target_uri: str) -> None:
    """Copy every file of one folder to another, each file atomically."""
    names = list_files(source_uri, recursive=True)
    if not names:
        raise FileNotFoundError(errno.ENOENT, "no files to copy", source_uri)
    for name in names:
        parts = name.split("/")
        copy_file(join(source_uri, *parts), join(target_uri, *parts))


def copy_file(source: str, target: str) -> None:
    """Create or replace a file atomically with the contents of another."""
    if not _is_object(source):
        upload(_local(source), target)
    elif _is_object(target):
        s3.copy(source, target)
    else:
        _put(_local(target), partial(s3.download, source))


def persist(folder: Path, uri: str) -> None:
    """Make a local folder durable at a URI: upload it, or sync it to disk if it is already stored there."""
    if local_path(uri) != folder:
        copy_folder(as_uri(folder), uri)
        return
    for file in folder.rglob("*"):
        if file.is_file():
            _sync(file)


def folder_bytes(uri: str) -> int:
    """The total size of all files in a folder, subfolders included."""
    if _is_object(uri):
        return s3.bytes_below(uri)
    return sum(file.stat().st_size for file in _local(uri).rglob("*") if file.is_file())


def delete_file(uri: str) -> None:
    """Delete a file if it exists."""
    if _is_object(uri):
        s3.delete(uri)
    else:
        _local(uri).unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Delete a folder and its contents if it exists."""
    if _is_object(uri):
        s3.delete_below(uri)
        return
    path = _local(uri)
    if path.is_dir():
        shutil.rmtree(path)


def _absolute(path: Path | str) -> Path:
    """The path from the root, without links. Raises NotFound for an unknown user's home, and BadRequest."""
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:
        raise NotFound(f"uri {str(path)!r} does not exist: no such user", param="uri") from error
    try:
        return expanded.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL character
        raise BadRequest(f"uri {str(path)!r} cannot be opened: {error}", param="uri") from error


def _shipped(uri: str) -> str:
    """The path of a shipped file in this process's installation. Raises BadRequest for a path out of it."""
    path = str(_absolute(f"{SHIPPED}/{unquote(uri.removeprefix(shapes.SCHEME))}"))
    if path != SHIPPED and not path.startswith(f"{SHIPPED}/"):
        message = f"uri {uri!r} cannot be opened: it leads out of the files that are shipped"
        raise BadRequest(message, param="uri")
    return path


def _is_object(uri: str) -> bool:
    return uri.startswith(s3.SCHEME)


def _local(uri: str) -> Path:
    return Path(resolve(uri)[1])


def _put(
    path: Path, write: Callable[[Path], object], publish: Callable[[Path, Path], object] = os.replace
) -> None:
    """Write a temporary file in the same folder, sync it to disk, then publish it under ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        write(part)
        _sync(part)
        publish(part, path)
    finally:
        part.unlink(missing_ok=True)


def _link(part: Path, path: Path) -> None:
    """Raises FileExistsError if ``path`` exists."""
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        _copy_to_new(part, path)


def _copy_to_new(part: Path, path: Path) -> None:
    """Raises FileExistsError if ``path`` exists. Any other error, such as a full disk, leaves no file."""
    with path.open("xb") as file:
        try:
            file.write(part.read_bytes())
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
