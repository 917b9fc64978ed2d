"""Scorers as files: the control plane writes their records; training, evaluation and Serve load them.

``scorers/{name}.json`` is the record of a registered scorer. Its files stay where they are.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from dde_core.scorers.kinds import KINDS, KindName, Scorer
from dde_core.shapes.scorers import ShapesScorer
from services.api.records import ScorerRecord
from services.api.requests import NAME_PATTERN, Resize
from services.artifacts import models
from services.artifacts.apart import call_apart
from services.artifacts.outline import outline
from services.artifacts.proof import file_bytes
from services.errors import BadRequest, NotFound
from services.stages import layout
from services.storage import files

BUILT_IN: dict[str, ScorerRecord] = {
    name: ScorerRecord(id=f"scorer_{name}", name=name, kind=kind.name, digest=name, created_at=0)
    for name, kind in KINDS.items()
    if kind.is_built_in
}
"""The scorers of the shapes world, which every project has."""


def publish(root: str, record: ScorerRecord) -> None:
    """Let Serve find a scorer under its name."""
    files.write_json(layout.scorer_record_uri(root, record.name), record.model_dump())


def retract(root: str, record: ScorerRecord) -> None:
    """Undo publish. The scorer's files stay."""
    files.delete_file(layout.scorer_record_uri(root, record.name))


def find(root: str, name: str) -> ScorerRecord:
    """The built-in or published scorer with this name. Raises NotFound."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if re.fullmatch(NAME_PATTERN, name):
        try:
            return ScorerRecord.model_validate_json(files.read_bytes(layout.scorer_record_uri(root, name)))
        except FileNotFoundError:
            pass
    raise NotFound(f"scorer {name!r} does not exist", param="scorers", code="scorer_not_found")


def prove(kind: KindName, uri: str, processor: str | None, resize: Resize) -> None:
    """Check that the files are those of a scorer of this kind. No weight is read.

    Raises DataError, naming the first key or shape that differs, and OSError for files that cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="dde-scorer-") as folder:
        paths = [_to_prove(part, Path(folder) / name) for name, part in _parts(uri, processor).items()]
        call_apart("the check of the scorer's files", _prove_here, kind, paths, resize)


def _to_prove(uri: str, folder: Path) -> Path:
    """A local file or folder in place; of a remote one, all but the weights."""
    return files.local_path(uri) or outline(uri, _copy_of(uri, folder))


def _prove_here(kind: KindName, paths: list[Path], resize: Resize) -> None:
    from dde_core.scorers.load import prove as prove_files  # only here: it loads torch

    prove_files(kind, *paths, resize=resize)


def digest_of(uri: str, processor: str | None) -> str:
    """sha256 over the digests of the checkpoint and the processor, each a file or all files of a folder."""
    found = [f"{name}\0{_digest(part)}\n" for name, part in _parts(uri, processor).items()]
    return hashlib.sha256("".join(found).encode()).hexdigest()


def _digest(uri: str) -> str:
    return models.folder_digest(uri) if file_bytes(uri) is None else models.file_digest(uri)


def load(record: ScorerRecord, device: str = "cpu", batch_size: int = 16) -> Scorer:
    """The scorer in memory, ready to call. It computes in float32, so scores are the same on every device
    but for rounding.

    Raises BadRequest if its files have changed since it was registered, DataError if they are not of its
    kind.
    """
    if KINDS[record.kind].is_built_in:
        return ShapesScorer(record.kind)
    from dde_core.scorers import load as loading  # only here: it loads torch

    paths = fetch(record)
    return loading.load(record.kind, *paths, resize=record.resize, device=device, batch_size=batch_size)


def truncated(record: ScorerRecord, prompts: Sequence[str]) -> list[int]:
    """Indices of the prompts that the scorer cuts. No weight is read. Raises like ``load``."""
    if KINDS[record.kind].is_built_in:
        return []
    from dde_core.scorers import load as loading  # only here: it loads torch

    checkpoint, *processor = fetch(record)
    return loading.truncated(record.kind, checkpoint, next(iter(processor), None), prompts)


def fetch(record: ScorerRecord) -> list[Path]:
    """The local checkpoint of a registered scorer, and its processor if it has one.

    Local files are used in place, and read to compare them with the digest. If one of the two is remote, both
    are copied to this node once, under their digest. Raises BadRequest if they differ from it.
    """
    if record.uri is None:
        raise BadRequest(f"scorer {record.name!r} of kind {record.kind!r} needs a uri", param="scorers")
    parts = _parts(record.uri, record.processor)
    paths = {name: files.local_path(part) for name, part in parts.items()}
    in_place = [path for path in paths.values() if path is not None]
    if len(in_place) == len(parts):
        _check_digest(record, record.uri, record.processor)
        return in_place
    entry = models.node_cache().hold_until_exit(record.digest, partial(_prepare_copy, record, parts))
    return [_copy_of(part, entry / name) for name, part in parts.items()]


def _parts(uri: str, processor: str | None) -> dict[str, str]:
    return {"checkpoint": uri} | ({"processor": processor} if processor else {})


def _copy_of(uri: str, folder: Path) -> Path:
    """The copy keeps the last part of its name, which may end as a format does."""
    return folder / _last_name(uri)


def _last_name(uri: str) -> str:
    return unquote(uri.rstrip("/").rpartition("/")[2])


def _prepare_copy(record: ScorerRecord, parts: dict[str, str]) -> tuple[int, Callable[[Path], None]]:
    sizes = [file_bytes(part) or files.folder_bytes(part) for part in parts.values()]
    return sum(sizes), partial(_copy, record, parts)


def _copy(record: ScorerRecord, parts: dict[str, str], entry: Path) -> None:
    copies = {name: files.as_uri(_copy_of(part, entry / name)) for name, part in parts.items()}
    for name, part in parts.items():
        copy = files.copy_folder if file_bytes(part) is None else files.copy_file
        copy(part, copies[name])
    _check_digest(record, copies["checkpoint"], copies.get("processor"))


def _check_digest(record: ScorerRecord, uri: str, processor: str | None) -> None:
    found = digest_of(uri, processor)
    if found != record.digest:
        message = (
            f"the files of scorer {record.name} at {record.uri!r} have changed: "
            f"digest {found}, registered as {record.digest}; register them under a new name"
        )
        raise BadRequest(message, param="scorers", code="scorer_changed")
