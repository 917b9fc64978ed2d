"""Scorers as files: the control plane writes their records; training, evaluation and Serve load them."""

from __future__ import annotations

from dde_core.scorers.kinds import KINDS, Scorer
from dde_core.shapes.scorers import ShapesScorer
from services.api.records import ScorerRecord

BUILT_IN: dict[str, ScorerRecord] = {
    name: ScorerRecord(id=f"scorer_{name}", name=name, kind=kind.name, digest=name, created_at=0)
    for name, kind in KINDS.items()
    if kind.is_built_in
}
"""The scorers of the shapes world, which every project has."""


def load(record: ScorerRecord, device: str = "cpu") -> Scorer:
    """The scorer in memory, ready to call."""
    return ShapesScorer(record.kind)
