"""Scorers as files: the control plane writes their records; training, evaluation and Serve load them."""

from __future__ import annotations

from pathlib import Path

from dde_core.scorers.kinds import KINDS, Scorer
from dde_core.shapes.scorers import ShapesScorer
from services.api.records import ScorerRecord
from services.errors import BadRequest
from services.storage import files

BUILT_IN: dict[str, ScorerRecord] = {
    name: ScorerRecord(id=f"scorer_{name}", name=name, kind=kind.name, digest=name, created_at=0)
    for name, kind in KINDS.items()
    if kind.is_built_in
}
"""The scorers of the shapes world, which every project has."""


def load(record: ScorerRecord, device: str = "cpu", batch_size: int = 16) -> Scorer:
    """The scorer in memory, ready to call. It computes in float32, so scores are the same on every device
    but for rounding.

    Raises BadRequest for a record without files that can be read here, DataError for files that are not of
    its kind.
    """
    if KINDS[record.kind].is_built_in:
        return ShapesScorer(record.kind)
    from dde_core.scorers import load as on_checkpoints  # imports torch, which the control plane never does

    checkpoint, processor = fetch(record)
    return on_checkpoints.load(
        record.kind, checkpoint, processor, resize=record.resize, device=device, batch_size=batch_size
    )


def fetch(record: ScorerRecord) -> tuple[Path, Path | None]:
    """Local paths of the scorer's checkpoint (a file or folder) and of its processor (a folder), if it has
    one."""
    if record.uri is None:
        raise BadRequest(f"scorer {record.name!r} of kind {record.kind!r} needs a uri", param="uri")
    processor = None if record.processor is None else _local(record.processor, "processor")
    return _local(record.uri, "uri"), processor


def _local(uri: str, param: str) -> Path:
    path = files.local_path(uri)
    if path is None:
        raise BadRequest(f"{param} must be a local path, got {uri!r}", param=param)
    return path
