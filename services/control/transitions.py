"""Which status may follow which, and which stages a job of each kind has. Any other change is a programming
error.

Resuming a paused or failed job queues it again; it continues at the stage that it had reached. A failed
study, which is never queued, continues with its evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dde_core.methods import METHODS
from services.api.records import FINAL_STATUSES, JobStatus, Stage

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    "validating": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"preparing", "running", "evaluating", "paused", "failed", "cancelled"}),
    "preparing": frozenset({"running", "succeeded", "paused", "failed", "cancelled"}),
    "running": frozenset({"evaluating", "paused", "failed", "cancelled"}),
    "evaluating": frozenset({"succeeded", "paused", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset({"queued", "evaluating"}),
    "cancelled": frozenset(),
}

UNFINISHED: tuple[JobStatus, ...] = tuple(status for status in TRANSITIONS if status not in FINAL_STATUSES)
STAGES: dict[str, tuple[Stage, ...]] = {
    "alignment": ("encode", "ledger", "train", "evaluate"),
    "evaluation": ("evaluate",),
    "generate": ("generate",),
    "relabel": ("relabel",),
}
STAGE_STATUS: dict[Stage, JobStatus] = {
    "encode": "preparing",
    "ledger": "preparing",
    "train": "running",
    "evaluate": "evaluating",
    "generate": "preparing",
    "relabel": "preparing",
}
ACTIVE: frozenset[JobStatus] = frozenset(STAGE_STATUS.values())
"""With these a job may have a run on the cluster."""


class IllegalTransition(RuntimeError):
    """A status may not follow the previous one."""


def check(old: str, new: str) -> None:
    """Raises IllegalTransition, naming both."""
    if new not in TRANSITIONS[old]:  # type: ignore[index]
        raise IllegalTransition(f"{old} -> {new}")


def next_stage(kind: str, stage: Stage | None, request: Mapping[str, Any]) -> Stage | None:
    """The stage that follows ``stage`` (None: the first one), or None after the last.

    Skips a ledger nobody reads, and the encoding of pairs that the policy draws itself.
    """
    stages = STAGES[kind]
    start = 0 if stage is None else stages.index(stage) + 1
    return next((each for each in stages[start:] if _is_needed(each, request)), None)


def _is_needed(stage: Stage, request: Mapping[str, Any]) -> bool:
    if stage == "encode":
        return request.get("rollouts") is None
    return stage != "ledger" or writes_ledger(request)


def writes_ledger(request: Mapping[str, Any]) -> bool:
    """Whether an alignment job requests a ledger and its method has a reference to record in it."""
    method = METHODS[request["objective"]["method"]]
    return method.has_reference and request["training"].get("reference") == "ledger"
