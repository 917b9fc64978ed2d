"""What a review of a job decides; the reconciler applies it to the database."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from services.api.records import JobStatus, ModelRecord, PairsResult, WaitReason
from services.control import transitions
from services.control.journal import printable
from services.control.tables import Job
from services.stages.specs import JournalEvent, Level, StageFailure

MAX_DELAY_S = 60.0
PARKED_S = 3600.0
"""When a queued job is reviewed at the latest. The reconciler takes it as soon as there is a slot for it.

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
    ``is_parked``: until then the job only waits, unless a slot becomes free or a request stops it.
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
    is_parked: bool = False

    def value(self, name: str) -> Any:
        """A column as it will be after this update."""
        return self.values.get(name, getattr(self.job, name))

    def log(self, message: str, level: Level = "info") -> None:
        """Add an event of the control plane to the job's history."""
        self.entries.append(JournalEvent(at=self.now, level=level, message=message))

    def move(self, status: JobStatus, why: str, level: Level = "info") -> None:
        """Change the status and log it. Raises IllegalTransition."""
        transitions.check(self.job.status, status)
        self.stop_waiting()
        self.values["status"] = status
        if status == "queued":
            self.values["waiting_since"] = self.now
        self.log(f"{self.job.status} -> {status}: {why}", level)

    def wait(self, reason: WaitReason, message: str, since: float | None = None) -> None:
        """Record what the job waits for, since ``since`` (None: now) or before; log a new reason."""
        if self.value("waiting_reason") != reason:
            self.log(f"waiting ({reason}): {message}")
        self.values["waiting_reason"] = reason
        self.values["waiting_message"] = printable(message)
        if self.value("waiting_since") is None:
            self.values["waiting_since"] = self.now if since is None else since

    def stop_waiting(self) -> None:
        """The job waits no longer. The time does not count as its stage's."""
        since = self.value("waiting_since")
        if since is None:
            return
        waited_s = max(0.0, self.now - since)
        if self.value("waiting_reason") is not None:
            self.log(f"waited {waited_s:.0f} s for room")
        self.values |= {"waiting_since": None, "waiting_reason": None, "waiting_message": None}
        self.values["waited_s"] = self.value("waited_s") + waited_s
        if self.value("stage_started_at") is not None:
            self.values["stage_started_at"] = self.value("stage_started_at") + waited_s

    def park(self, within_s: float = PARKED_S) -> None:
        """Let the job wait, without a review, until there is a slot for it, at most ``within_s``."""
        self.is_parked = True
        self.delay_s = min(PARKED_S, within_s)

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
        waiting_since=now if status == "queued" else None,
        waited_s=0.0,
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
