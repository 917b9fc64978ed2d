"""How long a job waits for room, how long it may, and what its answers show of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.api.answers import RunView, WaitingView
from services.control import queueing
from services.control.database import ProjectDatabase
from services.control.job_update import JobUpdate
from services.control.tables import Job
from services.control.transitions import ACTIVE
from services.control.views import JOB_VIEWS
from services.settings import Settings
from services.stages.specs import JournalEvent, StageFailure

STARTS_WITHIN_S = 10.0
"""A run that is pending for longer waits for room. No setting: it decides only what is shown."""


def patience_s(job: Job, settings: Settings) -> float:
    """How long the job may wait for room in all."""
    return float(job.request.get("max_wait_s") or settings.max_wait_s)


def left_s(update: JobUpdate, settings: Settings) -> float:
    """How long the job may go on to wait. Infinite while it does not wait."""
    since = update.value("waiting_since")
    if since is None:
        return float("inf")
    waited_s: float = update.value("waited_s") + update.now - since
    return patience_s(update.job, settings) - waited_s


def too_long(update: JobUpdate, settings: Settings) -> StageFailure:
    """Why a job fails that has waited too long."""
    limit_s = patience_s(update.job, settings)
    waited_s = limit_s - left_s(update, settings)
    message = f"waited {waited_s:.0f} s for room in all, and max_wait_s is {limit_s:g}"
    reason = f"{update.value('waiting_reason')}: {update.value('waiting_message')}"
    return StageFailure(
        message=f"{message}; the last reason was {reason}", code="waited_too_long", param="max_wait_s"
    )


def follow_journal(update: JobUpdate, entries: Iterable[JournalEvent]) -> None:
    """Take over what the driver reports of room for its workers. Its clock may differ: it is not used."""
    for entry in entries:
        if entry.waiting_for:
            update.wait("cluster_room", entry.waiting_for)
        elif entry.waiting_for is not None:
            update.stop_waiting()


def view(job: Job, queue: queueing.Queue | None = None, rank: int | None = None) -> WaitingView | None:
    """What the job waits for. ``queue`` and its ``rank`` there are of a queued job."""
    if job.unreachable_at is not None and job.status in (*ACTIVE, "queued"):
        message = "Ray does not answer; the job's events have its error"
        return _view("cluster_unreachable", job.unreachable_at, message)
    if queue is not None and rank:
        reason, message = queue.reason(job.project)
        since = job.waiting_since or job.created_at
        return _view(reason, since, message, queue.position(job.project, rank))
    if job.status in ACTIVE and job.waiting_since is not None:
        return _view(job.waiting_reason or "cluster_room", job.waiting_since, job.waiting_message)
    return None


def _view(reason: str, since: float, message: str | None, position: int | None = None) -> WaitingView:
    return WaitingView.model_validate(
        {"position": position, "reason": reason, "since": int(since), "message": message}
    )


def run_views(database: ProjectDatabase, settings: Settings, kind: str, rows: Sequence[Job]) -> list[RunView]:
    """The answers for these jobs of the project, with what each of them waits for."""
    queued = [row.seq for row in rows if row.status == "queued"]
    queue = None
    ranks: dict[int, int] = {}
    if queued:
        with database.database.read() as session:
            queue = queueing.read(session, settings)
            ranks = queueing.ranks(session, database.project, queued)
        if database.project not in queue.shares:  # the last queued one has started in between
            ranks = {}
    views = [JOB_VIEWS[kind](row) for row in rows]
    return [
        each.model_copy(update={"waiting": view(row, queue, ranks.get(row.seq))})
        for each, row in zip(views, rows, strict=True)
    ]
