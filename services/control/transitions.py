"""Which status may follow which, and what a job of each kind goes through. Anything else is a programming error.

A job that was paused, or that has failed, is queued once more when it is resumed, and goes on at the stage where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dde_core.methods import METHODS
from services.api.records import JobStatus, Stage

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    "validating": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"preparing", "running", "evaluating", "paused", "failed", "cancelled"}),
    "preparing": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"evaluating", "paused", "failed", "cancelled"}),
    "evaluating": frozenset({"succeeded", "paused", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset({"queued"}),
    "cancelled": frozenset(),
}

ENDED: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})
"""Nothing moves a job on from these but a request: a failed one may be resumed."""
UNFINISHED: tuple[JobStatus, ...] = tuple(status for status in TRANSITIONS if status not in ENDED)
STAGES: dict[str, tuple[Stage, ...]] = {
    "alignment": ("encode", "ledger", "train", "evaluate"),
    "evaluation": ("evaluate",),
}
STAGE_STATUS: dict[Stage, JobStatus] = {
    "encode": "preparing",
    "ledger": "preparing",
    "train": "running",
    "evaluate": "evaluating",
}
ACTIVE: frozenset[JobStatus] = frozenset(STAGE_STATUS.values())
"""At these a job may hold a run on the cluster."""


class IllegalTransition(RuntimeError):
    """A status that may not follow the one before."""


def check(old: str, new: str) -> None:
    """Raises IllegalTransition, naming both."""
    if new not in TRANSITIONS[old]:  # type: ignore[index]
        raise IllegalTransition(f"{old} -> {new}")


def next_stage(kind: str, stage: Stage | None, request: Mapping[str, Any]) -> Stage | None:
    """The stage after ``stage`` (the first one after None), or None after the last. Without those that a job does not need."""
    stages = STAGES[kind]
    place = 0 if stage is None else stages.index(stage) + 1
    return next((each for each in stages[place:] if each != "ledger" or writes_ledger(request)), None)


def writes_ledger(request: Mapping[str, Any]) -> bool:
    """Whether an alignment job asks for a ledger, and its method reads one: `sft` has no reference."""
    method = METHODS[request["objective"]["method"]]
    return method.has_reference and request["training"].get("reference") == "ledger"
