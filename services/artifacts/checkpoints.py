"""A training run's checkpoints in storage: committed by their record, verified by their digests.

    {run}/checkpoints/step-00000050/weights/ ...        the files of dde_core.checkpoint
                                   /checkpoint.json     CheckpointRecord, written last: without it there is no checkpoint

Training writes them, the control plane lists them. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dde_core.errors import DataError
from dde_core.node_cache import NodeCache, Prepare
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
    with _on_node(uuid.uuid4().hex, lambda: (0, Path.mkdir)) as path:
        yield path


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
    """The folder itself where storage is local, else one copy for all processes of this node that read it now."""
    if (local := files.local_path(target)) is not None:
        yield local
        return
    name = hashlib.sha256(f"{target} {record.model_dump_json()}".encode()).hexdigest()
    with _on_node(
        name, lambda: (record.num_bytes, lambda path: files.copy_folder(target, files.as_uri(path)))
    ) as path:
        yield path


@contextmanager
def _on_node(name: str, prepare: Prepare) -> Iterator[Path]:
    """A folder on this node, deleted after its last use. Folders of killed processes are deleted too."""
    cache = NodeCache(Path(tempfile.gettempdir()) / f"dde-checkpoints-{os.getuid()}", max_bytes=0)
    cache.evict_unused()
    try:
        with cache.hold(name, prepare) as path:
            yield path
    finally:
        cache.evict_unused()


def digest_of(file: Path) -> FileDigest:
    """Its length and sha256."""
    with file.open("rb") as stream:
        return FileDigest(bytes=file.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def delete(run: str, step: int) -> None:
    """Drop a checkpoint: its record first, so that no half of one is seen."""
    files.delete_file(layout.checkpoint_record_uri(run, step))
    files.delete_folder(layout.checkpoint_folder(run, step))


def invalidate(run: str, step: int) -> None:
    """Invalidate an unusable checkpoint; keep its files for inspection."""
    record = layout.checkpoint_record_uri(run, step)
    files.write_bytes(layout.broken_checkpoint_uri(run, step), files.read_bytes(record))
    files.delete_file(record)
