"""Alignment jobs and evaluations: created after every check that costs little, listed, paused, resumed, cancelled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session, aliased

from dde_core.errors import DataError
from services.api.requests import AlignmentJobCreate, EvaluationCreate
from services.artifacts import checkpoints
from services.control import checks, journal, models, stages
from services.control.database import Database, update_one
from services.control.idempotency import Once, create_once
from services.control.job_update import fresh
from services.control.listing import by_id, is_id, listed, newest
from services.control.problems import show
from services.control.tables import Dataset, Job, JobMetadata, Model, new_id
from services.control.transitions import UNFINISHED, check, writes_ledger
from services.control.views import checkpoint_view, evaluation_view, job_view
from services.errors import BadRequest, Conflict, NotFound
from services.stages.layout import CREDIT
from services.storage import files

VIEWS = {"alignment": job_view, "evaluation": evaluation_view}


def create_alignment(database: Database, once: Once, asked: AlignmentJobCreate) -> dict[str, Any]:
    """Raises BadRequest or NotFound for what can be known to fail before anything is spent."""

    def check_all() -> None:
        checks.check_alignment(asked)
        with database.read() as session:
            base = models.record_of(models.find(session, asked.model, "model"))
        checks.check_base(base, asked)

    def insert(session: Session, _: None) -> dict[str, Any]:
        base, dataset = models.find(session, asked.model, "model"), _dataset(session, asked)
        job_id = new_id("ajob")
        name = asked.name or f"{base.name[:40]}-{asked.objective.method}-{job_id[-6:]}"
        _refuse_base_name(session, name)
        request = _request(asked)
        row = _row(job_id, "alignment", "validating", request)
        row.name, row.model, row.dataset, row.output_model = name, base.id, dataset.id, new_id("model")
        row.inputs = {
            "model": models.record_of(base).model_dump(mode="json"),
            "dataset": {"uri": dataset.uri, "columns": dataset.columns, "digest": dataset.digest},
        }
        session.add(row)
        session.flush()
        session.add_all(
            JobMetadata(job_seq=row.seq, key=key, value=value) for key, value in asked.metadata.items()
        )
        journal.say(
            session, job_id, f"created: {asked.objective.method} on {base.name} with dataset {dataset.name}"
        )
        for message in _not_read(asked, request):
            journal.say(session, job_id, message, "warning")
        return job_view(row)

    return create_once(database, once, check_all, insert)


def create_evaluation(database: Database, once: Once, asked: EvaluationCreate) -> dict[str, Any]:
    """Raises BadRequest or NotFound, as above."""

    def insert(session: Session, _: None) -> dict[str, Any]:
        model, base = models.find(session, asked.model, "model"), models.find(session, asked.base, "base")
        request = asked.model_dump(mode="json") | {"prompts_uri": files.as_uri(asked.prompts_uri)}
        row = _row(new_id("eval"), "evaluation", "queued", request)
        row.model, row.base = model.id, base.id
        row.inputs = {
            key: models.record_of(value).model_dump(mode="json")
            for key, value in (("model", model), ("base", base))
        }
        session.add(row)
        session.flush()
        journal.say(session, row.id, f"created: {model.name} against {base.name}")
        return evaluation_view(row)

    return create_once(database, once, lambda: checks.check_evaluation(asked), insert)


def get(database: Database, kind: str, job_id: str) -> dict[str, Any]:
    """Raises NotFound."""
    with database.read() as session:
        return VIEWS[kind](by_id(session, Job, job_id, kind))


def credit(database: Database, job_id: str) -> bytes:
    """The credit record of an alignment job, as JSON. Raises NotFound for a job that has none (yet)."""
    with database.read() as session:
        row = by_id(session, Job, job_id, "alignment")
        trained, status = row.results.get("train"), row.status
    if trained is not None:
        try:
            return files.read_bytes(files.join(trained["model"]["uri"], CREDIT))
        except FileNotFoundError:
            pass
    why = "its model has none" if trained else "it is written when training is done"
    raise NotFound(
        f"job {job_id} has no credit record: {why}; the job is {status}", param="id", code="credit_not_found"
    )


def list_checkpoints(
    database: Database, root: str, job_id: str, after: int | None, limit: int
) -> dict[str, Any]:
    """What an alignment job's training has stored, of steps beyond ``after``, and what validation measured of it."""
    with database.read() as session:
        by_id(session, Job, job_id, "alignment")
    run = stages.run_folder(job_id, root)
    steps = (step for step in checkpoints.steps(run) if after is None or step > after)
    found = (view for step in steps if (view := _checkpoint(run, step)) is not None)
    return listed(list(islice(found, limit + 1)), limit)


def _checkpoint(run: str, step: int) -> dict[str, Any] | None:
    """None where training has dropped it since it was listed, and where its record is damaged: it cannot be gone on with."""
    try:
        record = checkpoints.read(run, step)
    except (FileNotFoundError, DataError):
        return None
    try:
        validation = files.read_json(checkpoints.outcome_uri(run, step))
    except (FileNotFoundError, ValueError):
        validation = None
    return checkpoint_view(record, checkpoints.folder(run, step), validation)


def page(
    database: Database,
    kind: str,
    after: str | None,
    limit: int,
    status: str | None,
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    """Jobs of one kind, newest first, with this status and all of these metadata."""
    query = select(Job).where(Job.kind == kind)
    if status is not None:
        query = query.where(Job.status == status)
    order: Any = Job.seq
    for key, value in metadata.items():
        row = aliased(JobMetadata)
        query = query.join(row, (row.job_seq == Job.seq) & (row.key == key) & (row.value == value))
        order = row.job_seq  # the same number, but read from the index on metadata
    with database.read() as session:
        return listed([VIEWS[kind](row) for row in newest(session, Job, query, after, limit, order)], limit)


def cancel(database: Database, kind: str, job_id: str) -> dict[str, Any]:
    """Ask for a job to be stopped; the reconciler does it. Raises Conflict for one that has ended otherwise."""
    now = time.time()
    with database.write() as session:
        by_id(session, Job, job_id, kind)
        open_jobs = update(Job).where(
            Job.id == job_id, Job.status.in_(UNFINISHED), Job.cancel_requested_at.is_(None)
        )
        if update_one(session, open_jobs.values(cancel_requested_at=now, next_at=now)):
            journal.say(session, job_id, "cancel requested")
        session.expire_all()
        row = by_id(session, Job, job_id, kind)
        if row.status in ("succeeded", "failed"):
            raise _conflict(row, f"has {row.status} already")
        return VIEWS[kind](row)


def pause(database: Database, job_id: str) -> dict[str, Any]:
    """Ask for an alignment job to store its state and free the cluster; the reconciler sees to it. Raises Conflict for one
    that has ended, or is being cancelled."""
    now = time.time()
    with database.write() as session:
        row = _held(session, job_id)
        if row.status not in UNFINISHED:
            raise _conflict(row, f"has ended already: it is {row.status}")
        if row.cancel_requested_at is not None:
            raise _conflict(row, "is being cancelled", "job_cancelled")
        if row.pause_requested_at is None:
            row.pause_requested_at = row.next_at = now
            journal.say(session, job_id, "pause requested")
        return job_view(row)


def resume(database: Database, job_id: str) -> dict[str, Any]:
    """Queue a paused or a failed job again. One that is still being paused goes on as after a stop that nobody asked for: looks
    in hand lose their token, since what they find is no longer wanted. Raises Conflict for any other job, and for a failed one
    that has entered no stage, or lacks now what it needs."""
    now = time.time()
    with database.write(alone=True) as session:
        row = _held(session, job_id)
        if row.status == "failed":
            _refuse_what_is_gone(session, row)
            row.submitted_at = (
                row.submitted_at or now
            )  # its run may live, and is ended before another one starts
            _queue_again(session, row, now - float(row.finished_at or now))
        elif row.pause_requested_at is None or row.cancel_requested_at is not None:
            raise _conflict(row, f"is neither paused nor failed: it is {row.status}")
        elif row.status == "paused":
            _queue_again(session, row, now - row.pause_requested_at)
        else:
            journal.say(session, job_id, "the pause is withdrawn")
        row.pause_requested_at = row.lock_token = row.lock_expires_at = None
        row.next_at = now
        return job_view(row)


def _queue_again(session: Session, row: Job, rested_s: float) -> None:
    """The time for which the job did nothing is no part of its stage's seconds."""
    check(row.status, "queued")
    journal.say(session, row.id, f"{row.status} -> queued: resumed on request")
    row.status = "queued"
    row.reason = row.finished_at = row.cancel_requested_at = row.ended_at = row.unreachable_at = None
    if row.stage_started_at is not None:
        row.stage_started_at += rested_s


def _refuse_what_is_gone(session: Session, row: Job) -> None:
    """A failed job holds nothing: what it needs to go on may have been deleted since, and its name given to a base."""
    if row.stage is None:
        raise _conflict(row, "has failed before its first stage: there is nothing to go on with")
    for model in (row.model, row.output_model if "train" in row.results else None):
        if model and session.scalar(select(Model.id).where(Model.id == model)) is None:
            raise _conflict(row, f"cannot go on: its model {model} was deleted", "model_not_found")
    if row.stage == "encode" and session.scalar(select(Dataset.id).where(Dataset.id == row.dataset)) is None:
        raise _conflict(row, f"cannot go on: its dataset {row.dataset} was deleted", "dataset_not_found")
    if base := _base_of(session, str(row.name)):
        raise _conflict(
            row, f"cannot go on: its name {row.name!r} belongs to the base model {base}", "name_taken"
        )


def _held(session: Session, job_id: str) -> Job:
    """An alignment job that nobody else changes until the transaction ends. Raises NotFound."""
    row = by_id(session, Job, job_id, "alignment")
    session.refresh(row, with_for_update=True)
    return row


def _conflict(row: Job, what: str, code: str | None = None) -> Conflict:
    return Conflict(f"job {row.id} {what}", param="id", code=code or f"job_{row.status}")


def _request(asked: AlignmentJobCreate) -> dict[str, Any]:
    """The body as it is kept: places of prompts as URIs."""
    request = asked.model_dump(mode="json")
    for part in (request["evaluation"], request["validation"] or {}):
        if part.get("prompts_uri"):
            part["prompts_uri"] = files.as_uri(part["prompts_uri"])
    return request


def _not_read(asked: AlignmentJobCreate, request: dict[str, Any]) -> Iterator[str]:
    """Settings that were given and that change nothing."""
    method = asked.objective.method
    for setting, value in asked.objective.ignored().items():
        yield f"objective.{setting} = {value} is not read by method {method!r}"
    if asked.training.reference == "ledger" and not writes_ledger(request):
        yield f"training.reference = 'ledger' is not read by method {method!r}"
    if asked.validation and asked.validation.prompts_uri and not asked.validation.num_prompts:
        yield "validation.prompts_uri is not read: validation.num_prompts is 0"


def _row(job_id: str, kind: str, status: str, request: dict[str, Any]) -> Job:
    now = time.time()
    none = {"results": {}, "stage_seconds": {}, "failures": 0}
    return Job(
        id=job_id, kind=kind, status=status, request=request, created_at=now, next_at=now, **none, **fresh(1)
    )


def _dataset(session: Session, asked: AlignmentJobCreate) -> Dataset:
    row = session.scalar(select(Dataset).where(Dataset.id == asked.dataset)) if is_id(asked.dataset) else None
    if row is None:
        raise NotFound(
            f"dataset: dataset {show(asked.dataset)} does not exist",
            param="dataset",
            code="dataset_not_found",
        )
    checks.check_dataset(row, asked)
    return row


def _refuse_base_name(session: Session, name: str) -> None:
    if is_id(name):
        raise BadRequest(f"name: must not have the form of an id, got {name!r}", param="name")
    if base := _base_of(session, name):
        raise BadRequest(
            f"name: belongs to the base model {base}, got {name!r}", param="name", code="name_taken"
        )


def _base_of(session: Session, name: str) -> str | None:
    """The id of the base model that has this name."""
    return session.scalar(select(Model.id).where(Model.name == name, Model.base.is_(None)).limit(1))
