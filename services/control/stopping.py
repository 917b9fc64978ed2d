"""Pause, resume and cancel: how the API records a request, and how the reviews of the job carry it out."""

from __future__ import annotations

import time

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from services.api.answers import JobView, RunView
from services.control import attempt, jobs, journal
from services.control.database import ProjectDatabase, update_one
from services.control.launchers.contract import RunState
from services.control.listing import by_id
from services.control.stage_run import StageRun
from services.control.tables import Dataset, Job, Model
from services.control.transitions import UNFINISHED, check
from services.control.views import JOB_VIEWS, job_view
from services.errors import Conflict

# ---- requests


def cancel(database: ProjectDatabase, kind: str, job_id: str) -> RunView:
    """Request the cancellation of a job. Raises NotFound, and Conflict if it has succeeded or failed."""
    with database.write() as session:
        return JOB_VIEWS[kind](request_cancel(session, job_id, kind))


def request_cancel(session: Session, job_id: str, kind: str) -> Job:
    """The job, to be cancelled from now on. Raises like ``cancel``."""
    now = time.time()
    by_id(session, Job, job_id, kind)
    not_cancelled = Job.status.in_(UNFINISHED) & Job.cancel_requested_at.is_(None)
    request = update(Job).where(Job.id == job_id, not_cancelled)
    if update_one(session, request.values(cancel_requested_at=now, next_at=now)):
        journal.log(session, job_id, "cancel requested")
    session.expire_all()
    row = by_id(session, Job, job_id, kind)
    if row.status in ("succeeded", "failed"):
        raise conflict(row, f"has {row.status} already")
    return row


def pause(database: ProjectDatabase, job_id: str) -> JobView:
    """Request that an alignment job stores its state and frees the cluster.

    Raises NotFound, and Conflict if the job has ended or is being cancelled.
    """
    now = time.time()
    with database.write() as session:
        row = locked(session, job_id, "alignment")
        if row.status not in UNFINISHED:
            raise conflict(row, f"has ended already: it is {row.status}")
        if row.cancel_requested_at is not None:
            raise conflict(row, "is being cancelled", "job_cancelled")
        if row.pause_requested_at is None:
            row.pause_requested_at = now
            row.next_at = now
            journal.log(session, job_id, "pause requested")
        return job_view(row)


def resume(database: ProjectDatabase, job_id: str) -> JobView:
    """Queue a paused or failed job again, or withdraw a pause that is not complete yet.

    The job's lock is released: a review in progress acts on a request that no longer holds, so its update is
    dropped. Raises NotFound, and Conflict for a job in any other state, for a failed one that had not reached
    a stage, and for one whose base model, dataset or name is gone.
    """
    now = time.time()
    with database.write(alone=True) as session:
        row = locked(session, job_id, "alignment")
        if row.status == "failed":
            _refuse_missing_inputs(session, row)
            # Its run may still be alive: a job with submitted_at stops it before it starts another.
            row.submitted_at = row.submitted_at or now
            row.waited_s = 0.0
            _queue_again(session, row, now - float(row.finished_at or now))
        elif row.pause_requested_at is None or row.cancel_requested_at is not None:
            raise conflict(row, f"is neither paused nor failed: it is {row.status}")
        elif row.status == "paused":
            _queue_again(session, row, now - row.pause_requested_at)
        else:
            journal.log(session, job_id, "pause withdrawn")
        row.pause_requested_at = None
        row.lock_token = None
        row.lock_expires_at = None
        row.next_at = now
        return job_view(row)


def _queue_again(session: Session, row: Job, idle_s: float) -> None:
    """Queue the job; the idle time does not count as its stage's time."""
    check(row.status, "queued")
    journal.log(session, row.id, f"{row.status} -> queued: resumed on request")
    row.status = "queued"
    row.reason = None
    row.finished_at = None
    row.cancel_requested_at = None
    row.ended_at = None
    row.unreachable_at = None
    row.waiting_since = time.time()
    row.waiting_reason = None
    if row.stage_started_at is not None:
        row.stage_started_at += idle_s


def _refuse_missing_inputs(session: Session, row: Job) -> None:
    """A failed job reserves nothing: its inputs may have been deleted since, and its name given to a base
    model.
    """
    if row.stage is None:
        raise conflict(row, "failed before its first stage: it has nothing to resume; create a new job")
    for model in (row.model, row.output_model if "train" in row.results else None):
        if model and session.scalar(select(Model.id).where(Model.id == model)) is None:
            raise conflict(row, f"cannot resume: its model {model} was deleted", "model_not_found")
    if row.stage == "encode" and session.scalar(select(Dataset.id).where(Dataset.id == row.dataset)) is None:
        raise conflict(row, f"cannot resume: its dataset {row.dataset} was deleted", "dataset_not_found")
    base = jobs.base_named(session, str(row.name))
    if base:
        message = f"cannot resume: its name {row.name!r} belongs to the base model {base}"
        raise conflict(row, message, "name_taken")


def locked(session: Session, job_id: str, kind: str) -> Job:
    """The job, locked against other writers until the transaction ends. Raises NotFound."""
    row = by_id(session, Job, job_id, kind)
    session.refresh(row, with_for_update=True)
    return row


def conflict(row: Job, what: str, code: str | None = None) -> Conflict:
    """The error of a request that the job's state does not allow."""
    return Conflict(f"job {row.id} {what}", param="id", code=code or f"job_{row.status}")


# ---- reviews


def continue_cancel(run: StageRun) -> None:
    """Stop the run; end the job once Ray confirms the end, or has had long enough to."""
    if run.may_exist:
        # Before the journal is read: others wait for the workers.
        is_over = run.stop_and_confirm(float(run.job.cancel_requested_at or 0))
        if not is_over:
            run.attempt.request_stop()  # training reads it in storage even while Ray is unreachable
        run.read_journal()
        if run.update.review_again or not is_over:
            return
    run.update.cancel()


def continue_pause(run: StageRun, *, has_ended: bool) -> None:
    """Stop the run; pause the job once it has ended. ``has_ended``: the stage wrote its last marker.

    Training gets time to write a checkpoint and to exit; another stage is stopped at once, as it commits its
    work continuously.
    """
    job = run.job
    requested_at = float(job.pause_requested_at or 0)
    status = run.attempt.status()
    state = None if status is None else status.state
    gives_up = state is None and run.now - requested_at >= run.settings.unreachable_s
    if has_ended or job.submitted_at is None or gives_up:
        is_over = run.stop_and_confirm(job.ended_at or requested_at)
    elif state == "running" and _time_is_up(run):
        is_over = _kill(run)
    elif state is None or state in attempt.RUNNING:
        _request_stop(run, state)
        is_over = False
    else:
        is_over = run.confirm_death(state)
    if is_over:
        mark_paused(run)


def mark_paused(run: StageRun) -> None:
    """Pause the job: nothing of it runs any more."""
    run.update.move("paused", "paused on request")
    run.update.values["submitted_at"] = None


def _request_stop(run: StageRun, state: RunState | None) -> None:
    run.update.values["stop_asked_at"] = run.job.stop_asked_at or run.now
    run.attempt.request_stop()
    if run.job.stage != "train" or state == "pending":
        run.attempt.stop()


def _time_is_up(run: StageRun) -> bool:
    """Whether the run had long enough to stop by itself: ``stopping_s`` if it acknowledged, else
    ``pause_ack_s``.

    Counts from the request to the run, not to the API: the control plane may have been down in between.
    """
    since = run.job.stop_asked_at
    if since is None or run.now - since < run.settings.pause_ack_s:
        return False
    return run.now - since >= run.settings.stopping_s or not run.attempt.stop_acknowledged()


def _kill(run: StageRun) -> bool:
    """Stop a run that did not stop by itself. True once it has ended."""
    since = run.job.ended_at or run.now
    run.update.values["ended_at"] = since
    if run.job.ended_at is None:
        waited_s = run.now - float(run.job.stop_asked_at or since)
        message = f"stage {run.job.stage} did not stop within {waited_s:.0f} s of the request"
        run.update.log(f"{message} and is being killed; what it stored last is kept", "warning")
    return run.stop_and_confirm(since)
