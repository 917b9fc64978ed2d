"""A node's cache of files and folders: its processes share each entry, and entries in use are never evicted.

    {folder}/{name}                 an entry, complete; its modification time is the time of its last use
    {folder}/{name}.part            an entry that is being written or deleted
    {folder}/{name}.reserved.part   the size in bytes of an entry that is being written
    {folder}/{stripe}.lock          held while an entry is made; the stripe is its name's first two characters
    {folder}/room.lock              held while entries are evicted, reserved, renamed or dropped

A user of an entry holds a shared lock on the entry itself, so eviction skips it. The kernel releases the
locks of a process that died; the next eviction deletes its unfinished entries.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"
RESERVED = ".reserved.part"
LOCK = ".lock"
Prepare = Callable[[], tuple[int, Callable[[Path], None]]]
"""Returns the size of an entry in bytes, and the function that writes it to a path."""


class NodeCache:
    """Entries exceed ``max_bytes`` only if those in use alone do. ``folder`` is created on first use."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._preferred: frozenset[str] = frozenset()
        self._held: dict[str, int] = {}
        self._making = threading.Lock()  # one entry at a time, which bounds this process's memory

    def prefer(self, names: Iterable[str]) -> None:
        """Evict these entries last. Replaces the names of the previous call."""
        self._preferred = frozenset(names)

    @contextmanager
    def hold(self, name: str, prepare: Prepare) -> Iterator[Path]:
        """The path of an entry, which is not evicted while the block runs.

        One process makes a missing entry and the others wait for it. An error leaves no entry.
        """
        descriptor = self._open(name, prepare)
        try:
            yield self.folder / name
        finally:
            os.close(descriptor)

    def hold_until_exit(self, name: str, prepare: Prepare) -> Path:
        """The path of an entry, which is not evicted before this process ends."""
        path = self.folder / name
        if name not in self._held or not path.exists():
            self._held[name] = self._open(name, prepare)
        return path

    def evict_unused(self) -> None:
        """Evict every entry that no process holds."""
        with self._locked("room"):
            self._evict_down_to(-1)

    def _open(self, name: str, prepare: Prepare) -> int:
        """A descriptor with a shared lock on the entry, which is made if it does not exist."""
        path = self.folder / name
        while True:
            with suppress(FileNotFoundError):
                descriptor = _lock_shared(path)
                if descriptor is not None:
                    return descriptor
            with self._making, self._locked(name[:2]):
                if path.exists():  # made by another thread or process
                    continue
                num_bytes, write = prepare()
                return self._make(path, num_bytes, write)

    def _make(self, path: Path, num_bytes: int, write: Callable[[Path], None]) -> int:
        """A descriptor with a shared lock on a new entry, taken before other processes see the entry.

        Its reservation counts towards the limit while it is written, so other writers need not wait.
        """
        part = path.with_name(f"{path.name}{PART}")
        reservation = path.with_name(f"{path.name}{RESERVED}")
        try:
            with self._locked("room"):
                self._evict_down_to(self._max_bytes - num_bytes)
                reservation.write_text(str(num_bytes))
                _delete(part)
            write(part)
            with _closed_on_error(part) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                with self._locked("room"):
                    part.rename(path)
                    reservation.unlink()
                return descriptor
        except BaseException:
            with self._locked("room"):
                _delete(part)
                reservation.unlink(missing_ok=True)
            raise

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Excludes all other threads and processes of this node."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}{LOCK}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _is_being_made(self, part: Path) -> bool:
        with suppress(FileNotFoundError), (self.folder / f"{part.name[:2]}{LOCK}").open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _evict_down_to(self, num_bytes: int) -> None:
        paths = [path for path in self.folder.iterdir() if path.suffix != LOCK]
        for path in paths:
            if path.suffix == PART and not self._is_being_made(path):
                _delete(path)
        entries = [path for path in paths if path.suffix != PART]
        sizes = {path: _size(path) for path in entries}
        reservations = [path for path in paths if path.name.endswith(RESERVED)]
        total = sum(sizes.values()) + sum(map(_reserved_bytes, reservations))
        for path in sorted(entries, key=lambda path: (path.name in self._preferred, _last_used(path))):
            if total <= num_bytes:
                return
            if _evict(path):
                total -= sizes[path]


def _lock_shared(path: Path) -> int | None:
    """A descriptor with a shared lock on the entry, marked as used; None if it was evicted meanwhile."""
    with _closed_on_error(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            os.utime(descriptor)
            return descriptor
    os.close(descriptor)
    return None


@contextmanager
def _closed_on_error(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _evict(path: Path) -> bool:
    """Delete an entry unless a process holds it. Returns whether it is deleted."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _delete(path)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _delete(path: Path) -> None:
    """Rename a folder before its deletion: a process that is killed here leaves no partial entry."""
    with suppress(FileNotFoundError):
        if not path.is_dir():
            path.unlink()
            return
        if path.suffix != PART:
            deleted = path.with_name(f"{path.name}.deleted{PART}")
            shutil.rmtree(deleted, ignore_errors=True)
            path = path.rename(deleted)
        shutil.rmtree(path, ignore_errors=True)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    total = 0
    for file in files:
        with suppress(FileNotFoundError):
            if file.is_file():
                total += file.stat().st_size
    return total


def _reserved_bytes(reservation: Path) -> int:
    """0 if the entry is complete meanwhile."""
    with suppress(FileNotFoundError):
        return int(reservation.read_text() or 0)
    return 0


def _last_used(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0
