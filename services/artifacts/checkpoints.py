"""A training run's checkpoints in storage: committed by their record, verified by their digests.

    {run}/checkpoints/step-00000050/weights/ ...        the files of dde_core.checkpoint
                                   /checkpoint.json     CheckpointRecord, written last: without it there is no checkpoint

Training writes them, the control plane lists them. Imports no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from dde_core.errors import DataError
from services.api.requests import Strict
from services.stages import layout
from services.storage import files


class BrokenCheckpoint(DataError):
    """Files or record of the checkpoint after ``step`` steps are not what was written: nobody can go on from it."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)
        self.message, self.step = message, step

    def __str__(self) -> str:
        return self.message


class FileDigest(Strict):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class ReaderPosition(Strict):
    """Which pair comes next: number ``pair`` of the order of epoch ``epoch``, both counted from 0."""

    epoch: int
    pair: int


class CheckpointRecord(Strict):
    """What a checkpoint is of. ``identity`` is everything that two runs must share for one to go on from the other's.

    ``images_seen`` counts pictures that went through the U-Net, ``workers`` who wrote it; ``metrics`` are those of its step,
    ``alarms`` what the next warnings depend on.
    """

    step: int
    pairs_seen: int
    images_seen: int
    reader: ReaderPosition
    ledger: str | None
    identity: dict[str, Any]
    workers: int
    attempt: int
    created_at: float
    metrics: dict[str, float]
    alarms: dict[str, Any]
    files: dict[str, FileDigest]

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(file.bytes for file in self.files.values())


def steps(run: str) -> list[int]:
    """The steps after which there is a checkpoint, ascending."""
    names = files.list_files(layout.checkpoints_folder(run), recursive=True)
    found = (layout.checkpoint_step(name) for name in names)
    return sorted(step for step in found if step is not None)


def read(run: str, step: int) -> CheckpointRecord:
    """Raises FileNotFoundError where there is no checkpoint, BrokenCheckpoint for a record that is no JSON, and DataError for
    one of another version of this code."""
    data = files.read_bytes(layout.checkpoint_record_uri(run, step))
    where = layout.checkpoint_folder(run, step)
    try:
        return CheckpointRecord.model_validate(json.loads(data))
    except ValidationError as error:
        raise DataError(
            f"the checkpoint at {where!r} was written by another version of this code: {error}"
        ) from error
    except ValueError as error:
        raise BrokenCheckpoint(
            f"the record of the checkpoint at {where!r} cannot be read: {error}", step
        ) from error


@contextmanager
def committed(run: str, record: CheckpointRecord, before_record: Callable[[], None]) -> Iterator[Path]:
    """A folder to write a checkpoint's files into; it becomes the checkpoint when the block ends without an error.

    On a local storage it is the place itself, invisible without its record; else a temporary one that is uploaded.
    ``before_record`` may raise at the last moment.
    """
    before_record()
    delete(run, record.step)  # what is left of an attempt that was killed
    target = layout.checkpoint_folder(run, record.step)
    with _written(target) as path:
        yield path
        members = sorted(file for file in path.rglob("*") if file.is_file())
        digests = {file.relative_to(path).as_posix(): digest_of(file) for file in members}
        files.persist(path, target)
    before_record()
    record_uri = layout.checkpoint_record_uri(run, record.step)
    files.write_json(record_uri, record.model_copy(update={"files": digests}).model_dump())


@contextmanager
def _written(target: str) -> Iterator[Path]:
    """The folder itself where storage is local, else a temporary one."""
    if (local := files.local_path(target)) is not None:
        local.mkdir(parents=True, exist_ok=True)
        yield local
        return
    with _scratch(uuid.uuid4().hex) as (place, lock):
        fcntl.flock(lock, fcntl.LOCK_EX)
        place.mkdir()
        try:
            yield place
        finally:
            _drop(place)


@contextmanager
def opened(run: str, record: CheckpointRecord, verify: bool = True) -> Iterator[Path]:
    """A local folder with a checkpoint's files. Raises BrokenCheckpoint where they are not those that were written."""
    target = layout.checkpoint_folder(run, record.step)
    with _fetched(target, record) as path:
        for name, written in record.files.items():
            if verify and (not (path / name).is_file() or digest_of(path / name) != written):
                raise BrokenCheckpoint(
                    f"{name} of the checkpoint at {target!r} is not what was written", record.step
                )
        yield path


@contextmanager
def _fetched(target: str, record: CheckpointRecord) -> Iterator[Path]:
    """The folder itself where storage is local, else one copy for all processes of this node that want it at the time."""
    if (local := files.local_path(target)) is not None:
        yield local
        return
    with _scratch(hashlib.sha256(f"{target} {record.model_dump_json()}".encode()).hexdigest()) as (
        copy,
        lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_SH)
        while (
            not copy.exists()
        ):  # it must be there when the shared lock is had: one lock becomes the other by letting go
            try:
                fcntl.flock(
                    lock, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # who waits for it here would wait for the readers, too
                if not copy.exists():
                    files.fetch_folder(target, copy)
            except BlockingIOError:
                time.sleep(random.uniform(0.0, 0.05))
            fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            yield copy
        finally:
            with suppress(BlockingIOError):  # somebody reads it still, and drops it later
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _drop(copy)


@contextmanager
def _scratch(name: str) -> Iterator[tuple[Path, TextIO]]:
    """A place for a folder on this node, and the file whose lock whoever uses it holds. Those of killed processes go."""
    cache = Path(tempfile.gettempdir()) / f"dde-checkpoints-{os.getuid()}"
    cache.mkdir(parents=True, exist_ok=True)
    for path in cache.glob("*.lock"):
        with path.open("w") as other, suppress(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _drop(path.with_suffix(""))
    with (cache / f"{name}.lock").open("w") as lock:
        yield cache / name, lock


def _drop(place: Path) -> None:
    """Out of sight first: who is killed while deleting leaves no half of a folder."""
    beside = place.with_name(f"{place.name}{files.PART}")
    shutil.rmtree(beside, ignore_errors=True)
    with suppress(FileNotFoundError):
        place.rename(beside)
        shutil.rmtree(beside, ignore_errors=True)


def digest_of(file: Path) -> FileDigest:
    """Its length and sha256."""
    with file.open("rb") as stream:
        return FileDigest(bytes=file.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def delete(run: str, step: int) -> None:
    """Drop a checkpoint: its record first, so that no half of one is seen."""
    files.delete_file(layout.checkpoint_record_uri(run, step))
    files.delete_folder(layout.checkpoint_folder(run, step))


def discard(run: str, step: int) -> None:
    """Invalidate an unusable checkpoint; keep its files for inspection."""
    record = layout.checkpoint_record_uri(run, step)
    files.write_bytes(layout.broken_checkpoint_uri(run, step), files.read_bytes(record))
    files.delete_file(record)
