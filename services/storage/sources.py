"""Sources: the files that requests name (pairs, prompts, base models), apart from what the system stores.

A process opens sources inside of its rules' folders and buckets alone (``hold_to``), a request inside of
those of its project (``hold_request_to``). Links are followed before the check, and nothing outside is looked
at. Only regular files, folders and objects are opened, and listings are bounded. A thread may have a time
limit; every function here raises once it is over.

Raises Forbidden for a URI outside and BadRequest for an unusable one. Both name the URI, never what is in it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from services.errors import BadRequest, Forbidden, NotFound
from services.storage import files, s3

MAX_FILES = 100_000
"""The most entries that are looked at in search of a source's files."""
MAX_ENTRIES = 2_000_000
"""The most entries of one folder of images."""
MAX_MODEL_FILES = 10_000
MAX_JSON_BYTES = 1 << 26
ANY_BUCKET = "s3://"
NOT_ALLOWED = "source_not_allowed"
OTHER_PROJECT = "other_project"
Entry = TypeVar("Entry")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class SourceRules:
    """Paths or URIs of folders, files and buckets that may be opened, and of those inside that may not.

    ``s3://bucket/prefix`` allows what is below the prefix, ``s3://`` every bucket. ``of_others`` is where the
    files of other projects are: nothing of it may be opened but what is below ``own``.
    """

    allowed: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    of_others: str | None = None
    own: str | None = None


@dataclass(frozen=True)
class _TimeLimit:
    seconds: float
    deadline: float


_rules = SourceRules()
_request_rules: ContextVar[SourceRules | None] = ContextVar("request_rules", default=None)
_limit: ContextVar[_TimeLimit | None] = ContextVar("limit", default=None)


def hold_to(rules: SourceRules) -> None:
    """Let this process open the sources that ``rules`` allow, and no others. Before the first call: none.

    Raises BadRequest for a root that is no path and no URI.
    """
    global _rules
    _roots(rules)
    _rules = rules


def hold_request_to(rules: SourceRules) -> None:
    """Hold this context, a request or a thread, to ``rules`` instead of those of its process.

    Raises BadRequest like ``hold_to``.
    """
    _roots(rules)
    _request_rules.set(rules)


def rules() -> SourceRules:
    """The rules that the caller is held to."""
    return _request_rules.get() or _rules


@contextmanager
def in_threads(
    read: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Iterator[Result]]:
    """``read`` of each item, in order, on several threads that have the caller's rules and time limit.

    No reading begins after the block. It waits for none that has begun: the block may be within a generator
    that ends when it is collected, which may be on one of these threads.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        calls = [pool.submit(copy_context().run, read, item) for item in items]
        yield (call.result() for call in calls)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within the block, this thread's calls raise BadRequest once ``seconds`` have passed."""
    token = _limit.set(_TimeLimit(seconds, time.monotonic() + seconds))
    try:
        yield
    finally:
        _limit.reset(token)


def check_time() -> None:
    """Raises BadRequest if this thread's time limit is over."""
    limit = _limit.get()
    if limit is not None and time.monotonic() > limit.deadline:
        raise too_slow(limit.seconds)


def too_slow(seconds: float) -> BadRequest:
    """The error of a reading that takes longer than ``seconds``."""
    message = f"uri: cannot be read within {seconds:g} s: use a smaller source or faster storage"
    return BadRequest(message, param="uri", code="read_timeout")


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """``files.resolve`` for a source. What is there is a regular file, a folder, or nothing."""
    check_time()
    check_allowed(uri)
    filesystem, path = files.resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        _check_regular(uri, path)
    return filesystem, path


def check_allowed(uri: str) -> None:
    """Raises Forbidden for a URI or path outside of the rules."""
    place = _canonical(uri)
    if _is_of_others(place):
        message = f"uri {uri!r} lies in the storage of another project"
        raise Forbidden(message, param="uri", code=OTHER_PROJECT)
    if not _is_allowed(place):
        how = "an operator allows folders and buckets with DDE_ALLOWED_SOURCES or `dde up --allow`"
        message = f"uri {uri!r} is outside of the sources that may be opened here: {how}"
        raise Forbidden(message, param="uri", code=NOT_ALLOWED)


def is_allowed(filesystem: fs.FileSystem, path: str) -> bool:
    """Whether the rules allow a path on a filesystem that ``resolve`` returned."""
    if "\0" in path:
        return True  # such a path names nothing
    if isinstance(filesystem, fs.LocalFileSystem):
        return _is_allowed(os.path.realpath(path))
    return _is_allowed(_object(path))


def open_file(uri: str) -> pa.NativeFile:
    """Open a source for random access."""
    filesystem, path = resolve(uri)
    return filesystem.open_input_file(path)


def read_bytes(uri: str, max_bytes: int) -> bytes:
    """A whole file of at most ``max_bytes``, whatever size its folder reports. Raises FileNotFoundError."""
    with open_file(uri) as stream:
        data = bytearray()
        while block := stream.read(min(1 << 20, max_bytes + 1 - len(data))):
            check_time()
            data += block
            if len(data) > max_bytes:
                message = f"uri {uri!r} is longer than {max_bytes} bytes"
                raise BadRequest(message, param="uri", code="source_too_large")
    return bytes(data)


def read_json(uri: str) -> Any:
    """The contents of a JSON file of at most MAX_JSON_BYTES. Raises ValueError for invalid JSON."""
    return json.loads(read_bytes(uri, MAX_JSON_BYTES))


def entries(uri: str) -> list[fs.FileInfo]:
    """The entries of a folder itself, with kinds and sizes. Raises FileNotFoundError."""
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return list(filesystem.get_file_info(fs.FileSelector(path)))
    with os.scandir(path) as scan:
        paths = [entry.path for entry in _counted(scan, uri, MAX_ENTRIES)]
    return list(filesystem.get_file_info(paths))


def list_files(uri: str, max_files: int = MAX_FILES) -> list[str]:
    """Sorted paths of the files below a folder, relative to it.

    Folders are entered through links, too, each once. Raises FileNotFoundError, Forbidden where one of them
    may not be opened, unless its name is hidden, and BadRequest for more than ``max_files`` entries.
    """
    filesystem, path = resolve(uri)
    found = _walk(path) if isinstance(filesystem, fs.LocalFileSystem) else s3.keys(uri)
    return sorted(name for name in _counted(found, uri, max_files) if name and not name.endswith("/"))


def sizes_below(uri: str) -> dict[str, int]:
    """The sizes of the files below a folder, by their paths relative to it. Raises like ``list_files``."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        names = list_files(uri, MAX_ENTRIES)
        infos = filesystem.get_file_info([f"{path}/{name}" for name in names])
    else:
        infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    files_below = (info for info in _counted(infos, uri, MAX_ENTRIES) if info.is_file)
    return {info.path[len(path) :].lstrip("/"): info.size for info in files_below}


def in_time(items: Iterable[Entry]) -> Iterator[Entry]:
    """The items, while there is time."""
    for item in items:
        check_time()
        yield item


def check_files(uri: str) -> None:
    """Check that a file, or every file of a folder, may be opened, as ``check_folder`` does."""
    if _type_of(uri) != fs.FileType.File:
        check_folder(uri)


def check_folder(uri: str) -> None:
    """Check that every file of a model may be opened and no JSON file is too large.

    Raises NotFound, Forbidden and BadRequest.
    """
    kind = _type_of(uri)
    if kind == fs.FileType.NotFound:
        raise NotFound(f"uri {uri!r} does not exist", param="uri")
    if kind != fs.FileType.Directory:
        raise BadRequest(f"uri {uri!r} is no folder", param="uri")
    for name in list_files(uri, MAX_MODEL_FILES):
        file = files.join(uri, *name.split("/"))
        filesystem, path = resolve(file)
        if name.endswith(".json") and (filesystem.get_file_info(path).size or 0) > MAX_JSON_BYTES:
            message = f"uri {file!r} is longer than {MAX_JSON_BYTES} bytes"
            raise BadRequest(message, param="uri", code="source_too_large")


def _type_of(uri: str) -> fs.FileType:
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type


def _walk(root: str) -> Iterator[str]:
    """Every entry below a local folder: a regular file's path relative to it, "" for other entries.

    A link to a folder within the root is not followed: its files are found anyway.
    """
    root = os.path.realpath(root)
    folders = [(root, "")]
    entered = {root}
    while folders:
        folder, prefix = folders.pop()
        with os.scandir(folder) as scan:
            for entry in sorted(islice(scan, MAX_ENTRIES), key=lambda entry: entry.name):
                real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                is_own = not entry.is_symlink() or not _is_below(real, root)
                if os.path.isdir(real) and is_own and real not in entered and not _is_closed(entry):
                    check_allowed(entry.path)
                    entered.add(real)
                    folders.append((real, f"{prefix}{entry.name}/"))
                yield f"{prefix}{entry.name}" if os.path.isfile(real) else ""


def _is_closed(entry: os.DirEntry[str]) -> bool:
    """Whether a folder may not be opened and is none of those that a dataset has: its name is hidden."""
    return entry.name.startswith(".") and not _is_allowed(os.path.realpath(entry.path))


def _counted(found: Iterable[Entry], uri: str, most: int) -> Iterator[Entry]:
    """The entries, while they are not too many and there is time."""
    for count, entry in enumerate(found, 1):
        check_time()
        if count > most:
            message = f"uri {uri!r} has more than {most} entries: name the folder of the files themselves"
            raise BadRequest(message, param="uri", code="source_too_large")
        yield entry


def _check_regular(uri: str, path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise NotFound(f"uri {uri!r} does not exist: its name is too long", param="uri") from error
        return  # whoever opens it gets the error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        message = f"uri {uri!r} is neither a regular file nor a folder"
        raise BadRequest(message, param="uri", code="not_a_file")


@lru_cache(maxsize=1024)
def _roots(rules: SourceRules) -> SourceRules:
    """The rules as canonical paths."""
    return SourceRules(
        (files.SHIPPED, *map(_canonical, rules.allowed)),
        tuple(map(_canonical, rules.denied)),
        _canonical(rules.of_others) if rules.of_others else None,
        _canonical(rules.own) if rules.own else None,
    )


def _is_allowed(place: str) -> bool:
    roots = _roots(rules())
    allowed = any(_is_below(place, root) for root in roots.allowed)
    denied = any(_is_below(place, root) for root in roots.denied)
    return allowed and not denied and not _is_of_others(place)


def _is_of_others(place: str) -> bool:
    roots = _roots(rules())
    is_shared = roots.of_others is not None and _is_below(place, roots.of_others)
    return is_shared and not (roots.own is not None and _is_below(place, roots.own))


def _is_below(place: str, root: str) -> bool:
    return place == root or place.startswith(root if root.endswith("/") else f"{root}/")


def _canonical(uri: str) -> str:
    """The absolute path without links of a local URI; ``s3://bucket/key``, decoded, of an object."""
    if uri == ANY_BUCKET:
        return uri
    if uri.startswith(s3.SCHEME):
        bucket, key = s3.parts(uri)
        if ".." in key.split("/"):
            raise BadRequest(f"uri {uri!r} cannot be opened: '..' in an object's name", param="uri")
        return _object(f"{bucket}/{key}")
    _, path = files.resolve(uri)
    try:
        return os.path.realpath(path)
    except (OSError, ValueError) as error:  # a NUL character
        raise BadRequest(f"uri {uri!r} cannot be opened: {error}", param="uri") from error


def _object(path: str) -> str:
    """An object's canonical URI: without empty parts, which some readers leave out, too."""
    return s3.SCHEME + "/".join(part for part in path.split("/") if part not in ("", "."))
