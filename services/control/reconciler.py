"""Advances unfinished jobs: take one, review it outside any transaction, apply the update.

Taking a job writes a token into its row; an update is applied only while the row still has that token. A
replica that was too slow therefore changes nothing, and any number of replicas may run this on one database.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Double,
    Select,
    bindparam,
    case,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.orm import Session

from services.api.records import ModelRecord
from services.artifacts import models
from services.control import making, promotion, queueing, stages, waiting
from services.control.database import Database, update_one
from services.control.job_update import MAX_DELAY_S, JobUpdate, StaleToken
from services.control.journal import printable, record
from services.control.launchers.clusters import Clusters
from services.control.launchers.sweeper import Sweeper
from services.control.review import JobReview
from services.control.studies import StudyReview
from services.control.tables import Job, Model
from services.control.transitions import UNFINISHED
from services.settings import Settings

log = logging.getLogger("dde")
THREADS = 4
STOP_S = 15.0
CANDIDATES = 8
MAX_BACKOFF_EXPONENT = 20


class Reconciler:
    """Background threads that each call ``once`` in a loop, as tests do.

    A slow job blocks one thread only.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        clusters: Clusters,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._settings = settings
        self._clusters = clusters
        self._clock = clock
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.last_review_at: float | None = None
        """When a thread last reviewed a job or found none due (Unix time)."""

    def start(self) -> None:
        """Start the threads."""
        self._stopping.clear()
        self._threads = [
            threading.Thread(target=self._run, name=f"reconciler-{i}", daemon=True) for i in range(THREADS)
        ]
        if self._clusters.own is not None:
            sweeper = Sweeper(self._database, self._clusters.own, self._clock)
            args = (self._stopping,)
            self._threads.append(
                threading.Thread(target=sweeper.sweep_until, args=args, name="sweeper", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def request_stop(self) -> None:
        """Take no further job."""
        self._stopping.set()

    def stop(self) -> None:
        """Stop the threads after the reviews in progress, but wait no longer than ``STOP_S`` for them.

        A review that hangs changes nothing any more once its lock has expired.
        """
        self.request_stop()
        deadline_s = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline_s - time.monotonic()))

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                busy = self.once()
                self.last_review_at = time.time()
            except Exception:  # the database is unreachable, so the error cannot be stored there
                log.exception("the reconciler could not take or update a job")
                busy = False
            if not busy:
                self._stopping.wait(self._settings.poll_interval_s)

    def once(self) -> bool:
        """Review the job that has been due longest. False if none is due."""
        job = self.take()
        if job is None:
            return False
        now = self._clock()
        try:
            if job.status == "queued" and not _is_stopping(job) and not self._has_slot(job):
                self.apply(self._wait_for_slot(job, now))
            else:
                self.apply(self._review(job, now))
        except StaleToken:
            log.warning("job %s was taken over by another replica", job.id)
        except Exception as error:  # one broken job must not stop the others
            log.exception("the review of job %s failed", job.id)
            self._postpone(job, error)
        return True

    def _review(self, job: Job, now: float) -> JobUpdate:
        if job.kind == "study":
            return StudyReview(job, self._database, self._settings, now).decide()
        return JobReview(job, self._settings, self._clusters.launcher(job), now).decide()

    def take(self) -> Job | None:
        """Lock a due job by writing a new token into its row. None if there is none."""
        now = self._clock()
        token = secrets.token_hex(16)
        with self._database.read() as session:
            candidates = [*self._next_to_start(session, now), *session.scalars(LONGEST_DUE, {"now": now})]
        for job_id in candidates:
            with self._database.write() as session:
                lock = {"lock_token": token, "lock_expires_at": now + self._settings.lock_s}
                mine = update(Job).where(Job.id == job_id, *_free(now), _may_start(now))
                if update_one(session, mine.values(**lock)):
                    return session.scalar(select(Job).where(Job.id == job_id))
        return None

    def _next_to_start(self, session: Session, now: float) -> list[str]:
        """The queued jobs for which there is a free slot, parked ones too."""
        ids = queueing.starting(session, self._settings)
        if not ids:
            return []
        startable = set(session.scalars(select(Job.id).where(Job.id.in_(ids), *_free(now), _may_start(now))))
        return [job_id for job_id in ids if job_id in startable]

    def _has_slot(self, job: Job) -> bool:
        """Whether the queued job may start: no other one takes the free slots."""
        with self._database.read() as session:
            return job.id in queueing.starting(session, self._settings)

    def _wait_for_slot(self, job: Job, now: float) -> JobUpdate:
        """Park the job, or fail it if it has waited too long."""
        update = JobUpdate(job, now)
        with self._database.read() as session:
            update.wait(*queueing.reason(session, self._settings, job.project))
        left_s = waiting.left_s(update, self._settings)
        if left_s <= 0:
            update.fail(waiting.too_long(update, self._settings))
        else:
            update.park(left_s)
        return update

    def apply(self, job_update: JobUpdate) -> None:
        """Write the update and release the job. Raises StaleToken if another replica has taken the job."""
        job = job_update.job
        released = {"next_at": self._next_at(job_update), "failures": 0, "last_error": None}
        with self._database.write() as session:
            self._write_columns(session, job, {**job_update.values, **released})
            record(session, job, job_update.entries)
            if job_update.dataset is not None:
                making.complete(session, job, job_update.dataset)
            if job_update.publish is not None:
                self._publish(session, job, job_update.publish)
            if job_update.set_alias:
                self._set_alias(session, job, job_update.promote)

    def _next_at(self, job_update: JobUpdate) -> Any:
        """When the next review is due; at once for a parked job that a request has stopped meanwhile."""
        now = self._clock()
        if job_update.review_again:
            return now
        next_at = now + (job_update.delay_s or self._settings.poll_interval_s)
        return case((_not_stopping(), next_at), else_=now) if job_update.is_parked else next_at

    def _write_columns(self, session: Session, job: Job, values: dict[str, Any]) -> None:
        mine = update(Job).where(Job.id == job.id, Job.lock_token == job.lock_token)
        if not update_one(session, mine.values(**values, lock_token=None, lock_expires_at=None)):
            raise StaleToken(job.id)

    def _publish(self, session: Session, job: Job, model: ModelRecord) -> None:
        session.add(Model(**model.model_dump(), project=job.project, current=False))
        session.flush()
        models.publish(stages.root(job, self._settings), model)

    def _set_alias(self, session: Session, job: Job, alias: str | None) -> None:
        """The last step of success: the name refers to the new model, in the database and for Serve.

        So does the name with ``alias``, if the model passed the job's gate.
        """
        named = (Model.project == job.project) & (Model.name == job.name)
        session.execute(update(Model).where(named, Model.current).values(current=False))
        session.execute(update(Model).where(Model.id == job.output_model).values(current=True))
        root = stages.root(job, self._settings)
        models.set_alias(root, str(job.name), str(job.output_model))
        if alias is not None:
            model = session.scalars(select(Model).where(Model.id == job.output_model)).one()
            promotion.point(session, root, model, alias, job.id)

    def _postpone(self, job: Job, error: Exception) -> None:
        """Retry the review later, with exponential backoff. Only a new error is added to the job's events."""
        now = self._clock()
        text = printable(f"{type(error).__name__}: {error}")
        backoff_s = self._settings.poll_interval_s * 2 ** min(job.failures, MAX_BACKOFF_EXPONENT)
        values = {
            "failures": job.failures + 1,
            "last_error": text,
            "next_at": now + min(MAX_DELAY_S, backoff_s),
        }
        retry = JobUpdate(job, now)
        if text != job.last_error:
            retry.log(f"the review failed and will be retried: {text}", "warning")
        try:
            with self._database.write() as session:
                self._write_columns(session, job, values)
                record(session, job, retry.entries)
        except StaleToken:
            log.warning("job %s was taken over by another replica", job.id)


def _is_stopping(job: Job) -> bool:
    return job.cancel_requested_at is not None or job.pause_requested_at is not None


def _not_stopping() -> ColumnElement[bool]:
    return Job.cancel_requested_at.is_(None) & Job.pause_requested_at.is_(None)


def _free(now: float | BindParameter[float]) -> tuple[ColumnElement[bool], ...]:
    """Unfinished and unlocked. A paused job waits until its cancellation is requested."""
    may_move = or_(Job.status != "paused", Job.cancel_requested_at.is_not(None))
    is_unlocked = or_(Job.lock_expires_at.is_(None), Job.lock_expires_at < now)
    return Job.status.in_(UNFINISHED), may_move, is_unlocked


def _may_start(now: float) -> ColumnElement[bool]:
    """Whether a job is due, or parked: it waits for a free slot then, and no other delay is that long. A
    queued job without a run and without a failed review only waits for a slot, too.
    """
    only_waits = (Job.status == "queued") & (Job.failures == 0) & Job.submitted_at.is_(None)
    return or_(Job.next_at <= now, Job.next_at > now + MAX_DELAY_S, only_waits)


NOW = bindparam("now", type_=Double)


def _longest_due() -> Select[Any]:
    """The ids of the jobs that have been due longest. Each status is read in the order of its index."""
    due = [
        select(Job.id, Job.next_at)
        .where(Job.status == status, *_free(NOW), Job.next_at <= NOW)
        .order_by(Job.next_at)
        .limit(CANDIDATES)
        .subquery()
        for status in UNFINISHED
    ]
    found = union_all(*(select(each) for each in due)).subquery()
    return select(found.c.id).order_by(found.c.next_at).limit(CANDIDATES)


LONGEST_DUE = _longest_due()
"""Built once: it is run at every poll of every thread."""
