"""Events and metrics of jobs as rows: recorded by the reconciler, listed and streamed by the API."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from services.api.records import Stage
from services.control.database import Database
from services.control.listing import by_id, listed
from services.control.tables import Event, Job, Metric
from services.control.transitions import UNFINISHED
from services.control.views import event_view, metric_view
from services.errors import BadRequest
from services.stages.specs import JournalEvent, Level

PAGE = 500
MAX_MESSAGE = 20_000
KEEP_ALIVE_S = 15.0


def record(session: Session, job: Job, entries: Sequence[JournalEvent]) -> None:
    """Add a journal's entries. Numbers of a step that was recorded before (a resumed training) are laid over the old."""
    said = [entry for entry in entries if entry.message is not None]
    session.add_all(
        Event(job=job.id, created_at=entry.at, level=entry.level, message=printable(str(entry.message)))
        for entry in said
    )
    measured = [entry for entry in entries if entry.metrics is not None and entry.step is not None]
    rows = _metric_rows(session, job, sorted({int(entry.step or 0) for entry in measured}))
    for entry in measured:
        row = rows[int(entry.step or 0)]
        row.at, row.values = entry.at, {**row.values, **(entry.metrics or {})}


def _metric_rows(session: Session, job: Job, steps: list[int]) -> dict[int, Metric]:
    """The rows of these steps, made where they are not there."""
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
    """Text that PostgreSQL can keep, and people can read."""
    text = text.replace("\0", "\ufffd")
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def say(session: Session, job_id: str, message: str, level: Level = "info") -> None:
    """Add one event of the control plane's own."""
    session.add(Event(job=job_id, created_at=time.time(), level=level, message=message))


def list_events(database: Database, kind: str, job_id: str, after: str | None, limit: int) -> dict[str, Any]:
    """A job's events in order of time, beyond the one with id ``after``."""
    number = _event_number(after)
    with database.read() as session:
        by_id(session, Job, job_id, kind)
        rows = _events(session, job_id, number, limit + 1)
    return listed([event_view(row) for row in rows], limit)


def list_metrics(
    database: Database, job_id: str, stage: Stage | None, after: int | None, limit: int
) -> dict[str, Any]:
    """A job's metrics in order of time, of steps beyond ``after``, of every stage or one."""
    query = select(Metric).where(Metric.job == job_id).order_by(Metric.seq).limit(limit + 1)
    if stage is not None:
        query = query.where(Metric.stage == stage)
    if after is not None:
        query = query.where(Metric.step > after)
    with database.read() as session:
        by_id(session, Job, job_id, "alignment")
        rows = session.scalars(query).all()
    return listed([metric_view(row) for row in rows], limit)


def nothing_left(database: Database, job_id: str, after: str | None) -> bool:
    """Has the job ended, and has the caller seen all of its events? Raises NotFound."""
    number = _event_number(after)
    with database.read() as session:
        job = by_id(session, Job, job_id, "alignment")
        return after is not None and job.status not in UNFINISHED and not _events(session, job_id, number, 1)


async def stream_events(
    database: Database, job_id: str, after: str | None, poll_s: float
) -> AsyncIterator[str]:
    """The job's events as server-sent events, old ones first, until the job has ended."""
    number, quiet_since = _event_number(after), time.monotonic()
    while True:
        rows, finished = await run_in_threadpool(_next_events, database, job_id, number)
        for row in rows:
            view = event_view(row)
            yield f"id: {view['id']}\nevent: job.event\ndata: {json.dumps(view)}\n\n"
            number, quiet_since = row.seq, time.monotonic()
        if finished and not rows:
            return
        if not rows and time.monotonic() - quiet_since > KEEP_ALIVE_S:
            yield ": still here\n\n"
            quiet_since = time.monotonic()
        if not finished:
            await asyncio.sleep(poll_s)


def _next_events(database: Database, job_id: str, after: int) -> tuple[list[Event], bool]:
    """The status is read before the events: a job's last event is written together with its last status."""
    with database.read() as session:
        status = session.scalar(select(Job.status).where(Job.id == job_id))
        return _events(session, job_id, after, PAGE), status not in UNFINISHED


def _events(session: Session, job_id: str, after: int, limit: int) -> list[Event]:
    return list(
        session.scalars(
            select(Event).where(Event.job == job_id, Event.seq > after).order_by(Event.seq).limit(limit)
        )
    )


def _event_number(event_id: str | None) -> int:
    if event_id is None:
        return 0
    if not re.fullmatch(r"event_[0-9a-f]{24}", event_id):
        raise BadRequest(f"after: is not the id of an event, got {event_id!r}", param="after")
    return min(int(event_id.removeprefix("event_"), 16), 2**62)
