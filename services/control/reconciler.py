"""Moves unfinished jobs on: take one, look at it outside of any transaction, apply what was found.

A job is taken by writing a token into its row, and everything that is found is applied only where the token still
stands: a replica that was too slow changes nothing. So any number of replicas may run this on one database.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from services.api.records import ModelRecord
from services.artifacts import models
from services.control.database import Database, update_one
from services.control.job_update import Change
from services.control.journal import printable, record
from services.control.launcher import Launcher
from services.control.review import LONGEST_PAUSE_S, Watch
from services.control.tables import Job, Model
from services.control.transitions import ACTIVE, UNFINISHED
from services.settings import Settings

log = logging.getLogger("dde")
THREADS = 4


class StaleToken(Exception):
    """Another replica has taken the job; what was found here is dropped."""


class Reconciler:
    """Background threads. ``once`` is all that each does; tests call that. A slow job holds up one thread only."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        launcher: Launcher,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database, self._settings, self._launcher, self._clock = database, settings, launcher, clock
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"reconciler-{i}", daemon=True) for i in range(THREADS)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the jobs in hand."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=30)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                busy = self.once()
            except Exception:  # the database is out of reach: nothing to record it in
                log.exception("the reconciler could not take or keep a job")
                busy = False
            if not busy:
                self._stopping.wait(self._settings.poll_interval_s)

    def once(self) -> bool:
        """Look at the job that has waited longest, if one is due. Says whether there was one."""
        job = self.take()
        if job is None:
            return False
        try:
            if job.status == "queued" and not _is_stopping(job) and self._must_wait(job):
                self.apply(job, Change())
                return True
            self.apply(job, Watch(job, self._settings, self._launcher, self._clock()).look())
        except StaleToken:
            log.warning("job %s was taken over", job.id)
        except Exception as error:  # whatever it is, other jobs must go on
            log.exception("job %s could not be looked at", job.id)
            self._postpone(job, error)
        return True

    def take(self) -> Job | None:
        """A due job with a token of ours in its row, or None."""
        now, token = self._clock(), secrets.token_hex(16)
        with self._database.read() as session:
            due = session.scalars(select(Job.id).where(*_free(now)).order_by(Job.next_at).limit(8)).all()
        for job_id in due:
            with self._database.write() as session:
                lock = {"lock_token": token, "lock_expires_at": now + self._settings.lock_s}
                if update_one(session, update(Job).where(Job.id == job_id, *_free(now)).values(**lock)):
                    return session.scalar(select(Job).where(Job.id == job_id))
        return None

    def _must_wait(self, job: Job) -> bool:
        """Is the cluster full, or an older job next? Two replicas that ask at once may let one too many through."""
        active = select(func.count()).where(Job.status.in_(ACTIVE))
        going_on = Job.cancel_requested_at.is_(None), Job.pause_requested_at.is_(None)
        older = select(func.count()).where(Job.status == "queued", Job.seq < job.seq, *going_on)
        with self._database.read() as session:
            free = self._settings.max_active_jobs - (session.scalar(active) or 0)
            return (session.scalar(older) or 0) >= free

    def apply(self, job: Job, change: Change) -> None:
        """Write what was found and let go of the job. Raises StaleToken where the job is no longer ours."""
        pause = 0.0 if change.again else change.pause_s or self._settings.poll_interval_s
        released = {"next_at": self._clock() + pause, "failures": 0, "last_error": None}
        with self._database.write() as session:
            self._update(session, job, {**change.values, **released})
            record(session, job, change.entries)
            if change.publish is not None:
                self._publish(session, change.publish)
            if change.point:
                self._point(session, job)

    def _update(self, session: Session, job: Job, values: dict[str, Any]) -> None:
        mine = update(Job).where(Job.id == job.id, Job.lock_token == job.lock_token)
        if not update_one(session, mine.values(**values, lock_token=None, lock_expires_at=None)):
            raise StaleToken(job.id)

    def _publish(self, session: Session, model: ModelRecord) -> None:
        session.add(Model(**model.model_dump(), current=False))
        session.flush()
        models.publish(self._settings.storage_uri, model)

    def _point(self, session: Session, job: Job) -> None:
        """The last step of success: the name means the new model, in the database and for Serve."""
        session.execute(update(Model).where(Model.name == job.name, Model.current).values(current=False))
        session.execute(update(Model).where(Model.id == job.output_model).values(current=True))
        models.point(self._settings.storage_uri, str(job.name), str(job.output_model))

    def _postpone(self, job: Job, error: Exception) -> None:
        """Try again later, with growing pauses; tell people once for each new error."""
        now, text = self._clock(), printable(f"{type(error).__name__}: {error}")
        pause = min(LONGEST_PAUSE_S, self._settings.poll_interval_s * 2 ** min(job.failures, 20))
        values = {"failures": job.failures + 1, "last_error": text, "next_at": now + pause}
        change = Change()
        if text != job.last_error:
            change.say(now, f"will be tried again: {text}", "warning")
        try:
            with self._database.write() as session:
                self._update(session, job, values)
                record(session, job, change.entries)
        except StaleToken:
            log.warning("job %s was taken over", job.id)


def _is_stopping(job: Job) -> bool:
    return job.cancel_requested_at is not None or job.pause_requested_at is not None


def _free(now: float) -> tuple[ColumnElement[bool], ...]:
    """Due, and in nobody's hands. Of a paused job only its cancellation is to be seen to."""
    moves = or_(Job.status != "paused", Job.cancel_requested_at.is_not(None))
    unlocked = or_(Job.lock_expires_at.is_(None), Job.lock_expires_at < now)
    return Job.status.in_(UNFINISHED), Job.next_at <= now, moves, unlocked
