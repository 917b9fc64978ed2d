"""Events and metrics of jobs as rows: recorded by the reconciler, listed and streamed by the API."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from services.api.answers import EventView, ListView, MetricView
from services.api.records import FINAL_STATUSES, Stage
from services.control.database import ProjectDatabase
from services.control.draining import Drain
from services.control.keys import Caller, check_not_revoked
from services.control.listing import by_id, list_view
from services.control.tables import Event, Job, Metric
from services.control.views import event_view, metric_view
from services.errors import NotFound, Unauthorized
from services.stages.specs import JournalEvent, Level

PAGE = 500
MAX_MESSAGE = 20_000
KEEP_ALIVE_S = 15.0
RECONNECT_MS = 500


def record(session: Session, job: Job, entries: Sequence[JournalEvent]) -> None:
    """Add a journal's entries.

    Training that resumes may repeat a step: its new metrics replace the old ones.
    """
    session.add_all(
        Event(job=job.id, created_at=entry.at, level=entry.level, message=printable(entry.message))
        for entry in entries
        if entry.message is not None
    )
    measured = [
        (entry.step, entry.at, entry.metrics)
        for entry in entries
        if entry.metrics is not None and entry.step is not None
    ]
    rows = _metric_rows(session, job, sorted({step for step, _, _ in measured}))
    for step, at, metrics in measured:
        rows[step].at = at
        rows[step].values = {**rows[step].values, **metrics}


def _metric_rows(session: Session, job: Job, steps: list[int]) -> dict[int, Metric]:
    """The row of each step, added if it does not exist."""
    if not steps:
        return {}
    query = select(Metric).where(
        Metric.job == job.id, Metric.stage == job.stage, Metric.step.between(steps[0], steps[-1])
    )
    rows = {row.step: row for row in session.scalars(query)}
    for step in steps:
        if step not in rows:
            rows[step] = Metric(job=job.id, stage=job.stage, step=step, at=0.0, values={})
            session.add(rows[step])
    return rows


def printable(text: str) -> str:
    """The text without NUL, which PostgreSQL cannot store, and at most ``MAX_MESSAGE`` characters long."""
    text = text.replace("\0", "\ufffd")
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def log(session: Session, job_id: str, message: str, level: Level = "info") -> None:
    """Add one event of the control plane itself."""
    session.add(Event(job=job_id, created_at=time.time(), level=level, message=message))


def list_events(
    database: ProjectDatabase, kind: str, job_id: str, after: str | None, limit: int
) -> ListView[EventView]:
    """A job's events in order of time, beyond the one with id ``after``. Raises NotFound."""
    number = _event_number(after)
    with database.read() as session:
        by_id(session, Job, job_id, kind)
        rows = _events(session, job_id, number, limit + 1)
    return list_view([event_view(row) for row in rows], limit)


def list_metrics(
    database: ProjectDatabase, job_id: str, stage: Stage | None, after: int | None, limit: int
) -> ListView[MetricView]:
    """A job's metrics in order of time, of steps beyond ``after``; of every stage if ``stage`` is None."""
    query = select(Metric).where(Metric.job == job_id).order_by(Metric.seq).limit(limit + 1)
    if stage is not None:
        query = query.where(Metric.stage == stage)
    if after is not None:
        query = query.where(Metric.step > after)
    with database.read() as session:
        by_id(session, Job, job_id, "alignment")
        rows = session.scalars(query).all()
    return list_view([metric_view(row) for row in rows], limit)


def is_read_to_the_end(database: ProjectDatabase, job_id: str, after: str | None) -> bool:
    """Whether the job has ended and event ``after`` is its last one. Raises NotFound."""
    number = _event_number(after)
    with database.read() as session:
        job = by_id(session, Job, job_id, "alignment")
        if after is None or job.status not in FINAL_STATUSES:
            return False
        return not _events(session, job_id, number, 1)


async def stream_events(
    database: ProjectDatabase, caller: Caller, job_id: str, after: str | None, poll_s: float, drain: Drain
) -> AsyncIterator[str]:
    """The job's events as server-sent events, oldest first, until the job has ended or the replica drains.

    In the second case clients connect again by themselves, after ``RECONNECT_MS``. A revoked key ends the
    stream at the next poll: the last event is ``error``, with the body of a 401.
    """
    number = _event_number(after)
    quiet_since = time.monotonic()
    while True:
        if drain.is_draining:
            yield f": this replica ends; connect again\nretry: {RECONNECT_MS}\n\n"
            return
        try:
            rows, finished = await run_in_threadpool(_next_events, database, caller, job_id, number)
        except Unauthorized as error:
            yield f"event: error\ndata: {json.dumps(error.body())}\n\n"
            return
        for row in rows:
            view = event_view(row)
            # json.dumps escapes every line separator, which would split an event's data.
            yield f"id: {view.id}\nevent: job.event\ndata: {json.dumps(view.model_dump(mode='json'))}\n\n"
            number = row.seq
            quiet_since = time.monotonic()
        if finished and not rows:
            return
        if not rows and time.monotonic() - quiet_since > KEEP_ALIVE_S:
            yield ": keep-alive\n\n"
            quiet_since = time.monotonic()
        if not finished:
            await asyncio.sleep(poll_s)


def _next_events(
    database: ProjectDatabase, caller: Caller, job_id: str, after: int
) -> tuple[list[Event], bool]:
    """Events beyond ``after``, and whether the job has ended. Raises Unauthorized for a revoked key.

    The status is read first: a job's last event is committed together with its final status.
    """
    with database.read() as session:
        check_not_revoked(session, caller)
        status = session.scalar(select(Job.status).where(Job.id == job_id))
        return _events(session, job_id, after, PAGE), status is None or status in FINAL_STATUSES


def _events(session: Session, job_id: str, after: int, limit: int) -> list[Event]:
    query = select(Event).where(Event.job == job_id, Event.seq > after).order_by(Event.seq).limit(limit)
    return list(session.scalars(query))


def _event_number(event_id: str | None) -> int:
    """The number in an event's id, 0 for None. Raises BadRequest for text of another form."""
    if event_id is None:
        return 0
    if not re.fullmatch(r"event_[0-9a-f]{24}", event_id):
        raise NotFound(f"after: is not the id of an event, got {event_id!r}", param="after")
    return min(int(event_id.removeprefix("event_"), 16), 2**62)
