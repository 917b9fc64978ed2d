"""Files by URI, local or in an object store, through pyarrow's filesystems. A URI is ``file:///...`` or ``s3://...``.

Nothing half-written is visible: a local file is written beside its place and renamed; an S3 object appears when its
upload is complete. Credentials and endpoints come from the environment that the cloud SDKs read.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyarrow import fs

from services.errors import BadRequest


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI and the path on it. A plain path is a local file. Raises BadRequest for other schemes."""
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
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


def exists(uri: str) -> bool:
    """Is there a file or folder?"""
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file that appears whole or not at all, replacing what was there."""
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    beside = f"{path}.{uuid.uuid4().hex}.part"
    with filesystem.open_output_stream(beside) as stream:
        stream.write(data)
    filesystem.move(beside, path)


def read_json(uri: str) -> Any:
    """A JSON file. Raises FileNotFoundError, or ValueError for one that is not JSON."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_bytes(uri, json.dumps(value, indent=1, sort_keys=True).encode())


def list_files(uri: str, *, recursive: bool = False) -> list[str]:
    """Paths below a folder, relative to it, sorted; empty where there is no such folder."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
    names = [info.path[len(path) :].lstrip("/") for info in infos if info.type == fs.FileType.File]
    return sorted(name for name in names if not name.endswith(".part"))


def copy_folder(source_uri: str, target_uri: str) -> None:
    """Copy every file below one folder to another, on whatever filesystems they are."""
    source, source_path = resolve(source_uri)
    target, target_path = resolve(target_uri)
    target.create_dir(target_path, recursive=True)
    fs.copy_files(source_path, target_path, source_filesystem=source, destination_filesystem=target)


def delete_file(uri: str) -> None:
    """Delete a file; nothing where there is none."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def delete_folder(uri: str) -> None:
    """Delete a folder and all below it; nothing where there is none."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)
