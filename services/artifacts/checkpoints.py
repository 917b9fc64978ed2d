"""A training run's checkpoints in storage: committed by their record, verified by their digests.

    {run}/checkpoints/step-00000050/weights/ ...        the files of dde_core.checkpoint
                                   /checkpoint.json     CheckpointRecord, written last to commit them

Training writes checkpoints and the control plane lists them. Imports no torch.
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
    """Files or record of the checkpoint after ``step`` steps are damaged: no run can resume from it."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)
        self.message = message
        self.step = step

    def __str__(self) -> str:
        return self.message


class FileDigest(Strict):
    """Size and digest of one file of a checkpoint."""

    bytes: int
    sha256: str


class ReaderPosition(Strict):
    """The next pair: number ``pair`` in the order of epoch ``epoch``, both counted from 0."""

    epoch: int
    pair: int


class CheckpointRecord(Strict):
    """A checkpoint's contents. A run can resume from it only if its own ``identity`` is equal.

    ``images_seen`` counts the images that passed through the U-Net, ``workers`` the training workers.
    ``metrics`` are those of its step; ``alarms`` is the state of the alarms.
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
        """The total size of all files."""
        return sum(file.bytes for file in self.files.values())


def steps(run: str) -> list[int]:
    """The steps of all committed checkpoints, ascending."""
    names = files.list_files(layout.checkpoints_folder(run), recursive=True)
    steps_or_none = (layout.checkpoint_step(name) for name in names)
    return sorted(step for step in steps_or_none if step is not None)


def read(run: str, step: int) -> CheckpointRecord:
    """The record of a checkpoint.

    Raises FileNotFoundError if the checkpoint does not exist, BrokenCheckpoint if the record is not JSON, and
    DataError if another version of this code wrote it.
    """
    data = files.read_bytes(layout.checkpoint_record_uri(run, step))
    folder = layout.checkpoint_folder(run, step)
    try:
        return CheckpointRecord.model_validate(json.loads(data))
    except ValidationError as error:
        message = f"the checkpoint at {folder!r} was written by another version of this code: {error}"
        raise DataError(message) from error
    except ValueError as error:
        message = f"the record of the checkpoint at {folder!r} is not JSON: {error}"
        raise BrokenCheckpoint(message, step) from error


@contextmanager
def committed(run: str, record: CheckpointRecord, before_record: Callable[[], None]) -> Iterator[Path]:
    """A folder for a checkpoint's files. If the block ends without an error, its files become the checkpoint.

    ``before_record`` is called at the start and just before the record is written, and may raise.
    """
    before_record()
    delete(run, record.step)  # a killed attempt may have left files
    target = layout.checkpoint_folder(run, record.step)
    with _writable(target) as path:
        yield path
        members = sorted(file for file in path.rglob("*") if file.is_file())
        digests = {file.relative_to(path).as_posix(): digest_of(file) for file in members}
        files.persist(path, target)
    before_record()
    record_uri = layout.checkpoint_record_uri(run, record.step)
    files.write_json(record_uri, record.model_copy(update={"files": digests}).model_dump())


@contextmanager
def _writable(target: str) -> Iterator[Path]:
    """The target itself in local storage, invisible without its record; else a temporary folder to upload."""
    local = files.local_path(target)
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)
        yield local
        return
    with _node_folder(uuid.uuid4().hex, lambda: (0, Path.mkdir)) as path:
        yield path


@contextmanager
def opened(run: str, record: CheckpointRecord, verify: bool = True) -> Iterator[Path]:
    """A local folder with a checkpoint's files.

    With ``verify``, raises BrokenCheckpoint if a file is missing or differs from its digest.
    """
    target = layout.checkpoint_folder(run, record.step)
    with _readable(target, record) as path:
        if verify:
            _check_files(path, target, record)
        yield path


def _check_files(folder: Path, target: str, record: CheckpointRecord) -> None:
    for name, written in record.files.items():
        file = folder / name
        if not file.is_file():
            raise BrokenCheckpoint(f"{name} of the checkpoint at {target!r} is missing", record.step)
        if digest_of(file) != written:
            message = f"{name} of the checkpoint at {target!r} differs from its recorded digest"
            raise BrokenCheckpoint(message, record.step)


@contextmanager
def _readable(target: str, record: CheckpointRecord) -> Iterator[Path]:
    """The target itself in local storage; else a copy that concurrent readers on this node share."""
    local = files.local_path(target)
    if local is not None:
        yield local
        return

    def prepare() -> tuple[int, Callable[[Path], None]]:
        return record.num_bytes, lambda path: files.copy_folder(target, files.as_uri(path))

    name = hashlib.sha256(f"{target} {record.model_dump_json()}".encode()).hexdigest()
    with _node_folder(name, prepare) as path:
        yield path


@contextmanager
def _node_folder(name: str, prepare: Prepare) -> Iterator[Path]:
    """A folder on this node, deleted after its last use. Also deletes the folders of killed processes."""
    cache = NodeCache(Path(tempfile.gettempdir()) / f"dde-checkpoints-{os.getuid()}", max_bytes=0)
    cache.evict_unused()
    try:
        with cache.hold(name, prepare) as path:
            yield path
    finally:
        cache.evict_unused()


def digest_of(file: Path) -> FileDigest:
    """The size and sha256 of a file."""
    with file.open("rb") as stream:
        return FileDigest(bytes=file.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def delete(run: str, step: int) -> None:
    """Delete a checkpoint. Its record goes first, so a partly deleted checkpoint is never read."""
    files.delete_file(layout.checkpoint_record_uri(run, step))
    files.delete_folder(layout.checkpoint_folder(run, step))


def invalidate(run: str, step: int) -> None:
    """Invalidate an unusable checkpoint; keep its files for inspection."""
    record = layout.checkpoint_record_uri(run, step)
    files.write_bytes(layout.broken_checkpoint_uri(run, step), files.read_bytes(record))
    files.delete_file(record)
