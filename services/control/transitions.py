"""Which status may follow which, and what a job of each kind goes through. Anything else is a programming error."""

from __future__ import annotations

from services.contracts import JobStatus, Stage

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    "validating": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"preparing", "evaluating", "failed", "cancelled"}),
    "preparing": frozenset({"running", "failed", "cancelled"}),
    "running": frozenset({"evaluating", "failed", "cancelled"}),
    "evaluating": frozenset({"succeeded", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}

UNFINISHED: tuple[JobStatus, ...] = tuple(status for status, following in TRANSITIONS.items() if following)
STAGES: dict[str, tuple[Stage, ...]] = {"alignment": ("encode", "train", "evaluate"), "evaluation": ("evaluate",)}
STAGE_STATUS: dict[Stage, JobStatus] = {"encode": "preparing", "train": "running", "evaluate": "evaluating"}


class IllegalTransition(RuntimeError):
    """A status that may not follow the one before."""


def check(old: str, new: str) -> None:
    """Raises IllegalTransition, naming both."""
    if new not in TRANSITIONS[old]:  # type: ignore[index]
        raise IllegalTransition(f"{old} -> {new}")


def next_stage(kind: str, stage: Stage | None) -> Stage | None:
    """The stage after ``stage`` (the first one after None), or None after the last."""
    stages = STAGES[kind]
    place = 0 if stage is None else stages.index(stage) + 1
    return stages[place] if place < len(stages) else None
