"""Outlines of remote checkpoints: their files with all that says what is in them, and without the weights.

A proof reads the names and shapes of tensors. The outline of a file of gigabytes has its size, but only the
parts that hold those are written; the rest is a hole that takes no room on disk.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from dde_core.models.weight_files import LENGTH_BYTES, MAX_HEADER_BYTES
from services.artifacts.proof import file_bytes
from services.storage import files, sources

WHOLE_BYTES = 16 << 20
"""A file of at most this size is copied whole: configs, vocabularies, heads of a scorer."""
START_BYTES = 1 << 20
"""Of a larger file, this much of its beginning is copied, or its whole header."""
Ranges = Iterator[tuple[int, int]]


def outline(uri: str, target: Path) -> Path:
    """Write the outline of a file or a folder to ``target``, and return ``target``."""
    if file_bytes(uri) is not None:
        _outline_file(uri, target)
        return target
    for name in files.list_files(uri, recursive=True):
        parts = name.split("/")
        _outline_file(files.join(uri, *parts), target.joinpath(*parts))
    return target


def _outline_file(uri: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    filesystem, path = files.resolve(uri)
    with filesystem.open_input_file(path) as source, target.open("wb") as copy:
        size = source.size()
        copy.truncate(size)
        for start, end in _to_copy(source, size):
            sources.check_time()
            source.seek(start)
            copy.seek(start)
            copy.write(source.read(end - start))


def _to_copy(source: pa.NativeFile, size: int) -> Ranges:
    """The parts to copy: the whole of a small file; the start of a large one, which has the header of
    safetensors, and all of a zip archive (a .pt file) but the tensors' own data.
    """
    if size <= WHOLE_BYTES:
        yield 0, size
        return
    header = LENGTH_BYTES + int.from_bytes(source.read(LENGTH_BYTES), "little")
    has_header = header <= min(size, MAX_HEADER_BYTES)
    yield 0, max(START_BYTES, header) if has_header else START_BYTES
    source.seek(0)
    if zipfile.is_zipfile(source):
        yield from _parts_of_archive(zipfile.ZipFile(source), size)


def _parts_of_archive(archive: zipfile.ZipFile, size: int) -> Ranges:
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    ends = [member.header_offset for member in members[1:]] + [archive.start_dir]
    for member, end in zip(members, ends, strict=True):
        if "/data/" not in member.filename and end - member.header_offset <= WHOLE_BYTES:
            yield member.header_offset, end
    yield archive.start_dir, size
