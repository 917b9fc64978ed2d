"""What a review of a job decides; the reconciler applies it to the database."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from services.api.records import JobStatus, ModelRecord, PairsResult
from services.control import transitions
from services.control.journal import printable
from services.control.tables import Job
from services.stages.specs import JournalEvent, Level, StageFailure

MAX_DELAY_S = 60.0
PARKED_S = 3600.0
"""When a queued job is reviewed at the latest. The reconciler takes it as soon as there is a free slot.

Reviews of every waiting job at each poll would take the more time, the more jobs wait.
"""


class StaleToken(Exception):
    """Another replica has taken the job, or a request has changed it; this replica's update is dropped."""


@dataclass
class JobUpdate:
    """Changes to one job at time ``now``: new column values, journal entries, a model, a dataset.

    ``dataset`` completes the dataset that the job makes. ``publish`` is a model to register. ``set_alias``:
    the job's name refers to its model from now on, and so does the name with the alias ``promote``.
    The next review follows at once if ``review_again``, else after ``delay_s`` (None: at the next poll).
    """

    job: Job
    now: float
    values: dict[str, Any] = field(default_factory=dict)
    entries: list[JournalEvent] = field(default_factory=list)
    dataset: PairsResult | None = None
    publish: ModelRecord | None = None
    set_alias: bool = False
    promote: str | None = None
    review_again: bool = False
    delay_s: float | None = None

    def log(self, message: str, level: Level = "info") -> None:
        """Add an event of the control plane to the job's history."""
        self.entries.append(JournalEvent(at=self.now, level=level, message=message))

    def move(self, status: JobStatus, why: str, level: Level = "info") -> None:
        """Change the status and log it. Raises IllegalTransition."""
        transitions.check(self.job.status, status)
        self.values["status"] = status
        self.log(f"{self.job.status} -> {status}: {why}", level)

    def park(self) -> None:
        """Let the job wait, without a review, until there is a free slot."""
        self.delay_s = PARKED_S

    def succeed(self) -> None:
        """End the job after its last stage."""
        self._finish("succeeded", "the job is done")
        self.values |= {"reason": None, "stage": None}

    def fail(self, failure: StageFailure) -> None:
        """End the job with an error; it may be resumed."""
        self._finish("failed", failure.message, "error")
        self.values["reason"] = _reason(failure)

    def cancel(self) -> None:
        """End the job on request."""
        cancelled = StageFailure(code="cancelled", message="cancelled on request")
        self._finish("cancelled", cancelled.message)
        self.values["reason"] = _reason(cancelled)

    def _finish(self, status: JobStatus, why: str, level: Level = "info") -> None:
        self.move(status, why, level)
        self.values |= {"finished_at": self.now, "pause_requested_at": None}


def _reason(failure: StageFailure) -> dict[str, Any]:
    return {**failure.model_dump(), "message": printable(failure.message)}


def new_job(job_id: str, kind: str, status: JobStatus, request: dict[str, Any]) -> Job:
    """A job that is due at once, without its inputs and the names of what it uses."""
    now = time.time()
    return Job(
        id=job_id,
        kind=kind,
        status=status,
        request=request,
        results={},
        stage_seconds={},
        failures=0,
        created_at=now,
        next_at=now,
        **new_attempt_columns(1),
    )


def new_attempt_columns(number: int) -> dict[str, Any]:
    """Column values of attempt ``number`` before it is submitted, with no restarts counted."""
    return {
        "attempt": number,
        "restarts": 0,
        "restart_step": 0,
        "submitted_at": None,
        "journal_cursor": 0,
        "stop_asked_at": None,
        "ended_at": None,
        "unreachable_at": None,
    }
