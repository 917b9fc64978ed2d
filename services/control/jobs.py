"""Alignment jobs and evaluations: created after every check that costs little, listed, cancelled."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session, aliased

from dde_core.errors import DataError
from dde_core.shapes import scorers
from services import registry, storage
from services.contracts import CREDIT, AlignmentJobCreate, EvaluationConfig, EvaluationCreate, ModelRecord, most_workers
from services.control import journal, models
from services.control.database import Database, update_one
from services.control.idempotency import Once, create_once
from services.control.listing import by_id, is_id, listed, newest
from services.control.problems import show
from services.control.tables import Dataset, Job, JobMetadata, Model, new_id
from services.control.transitions import UNFINISHED, writes_ledger
from services.control.views import evaluation_view, job_view
from services.errors import BadRequest, Conflict, NotFound
from services.inspection import check_bad

VIEWS = {"alignment": job_view, "evaluation": evaluation_view}


def create_alignment(database: Database, once: Once, asked: AlignmentJobCreate) -> dict[str, Any]:
    """Raises BadRequest or NotFound for what can be known to fail before anything is spent."""

    def check() -> None:
        if most_workers(asked.workers) > asked.training.batch_size:
            raise BadRequest(f"workers: must be at most training.batch_size, got {asked.workers}", param="workers")
        _check_evaluation(asked.evaluation, "evaluation.")
        with database.read() as session:
            base = models.record_of(models.find(session, asked.model, "model"))
        _check_fit(base, asked)

    def insert(session: Session, _: None) -> dict[str, Any]:
        base, dataset = models.find(session, asked.model, "model"), _dataset(session, asked)
        job_id = new_id("ajob")
        name = asked.name or f"{base.name[:40]}-{asked.objective.method}-{job_id[-6:]}"
        _refuse_base_name(session, name)
        request = asked.model_dump(mode="json")
        request["evaluation"]["prompts_uri"] = storage.as_uri(asked.evaluation.prompts_uri)
        row = _row(job_id, "alignment", "validating", request)
        row.name, row.model, row.dataset, row.output_model = name, base.id, dataset.id, new_id("model")
        row.inputs = {
            "model": models.record_of(base).model_dump(mode="json"),
            "dataset": {"uri": dataset.uri, "columns": dataset.columns, "digest": dataset.digest},
        }
        session.add(row)
        session.flush()
        session.add_all(JobMetadata(job_seq=row.seq, key=key, value=value) for key, value in asked.metadata.items())
        journal.say(session, job_id, f"created: {asked.objective.method} on {base.name} with dataset {dataset.name}")
        for setting, value in asked.objective.ignored().items():
            message = f"objective.{setting} = {value} is not read by method {asked.objective.method!r}"
            journal.say(session, job_id, message, "warning")
        if asked.training.reference == "ledger" and not writes_ledger(request):
            message = f"training.reference = 'ledger' is not read by method {asked.objective.method!r}"
            journal.say(session, job_id, message, "warning")
        return job_view(row)

    return create_once(database, once, check, insert)


def create_evaluation(database: Database, once: Once, asked: EvaluationCreate) -> dict[str, Any]:
    """Raises BadRequest or NotFound, as above."""

    def insert(session: Session, _: None) -> dict[str, Any]:
        model, base = models.find(session, asked.model, "model"), models.find(session, asked.base, "base")
        request = asked.model_dump(mode="json") | {"prompts_uri": storage.as_uri(asked.prompts_uri)}
        row = _row(new_id("eval"), "evaluation", "queued", request)
        row.model, row.base = model.id, base.id
        row.inputs = {key: models.record_of(value).model_dump(mode="json") for key, value in (("model", model), ("base", base))}
        session.add(row)
        session.flush()
        journal.say(session, row.id, f"created: {model.name} against {base.name}")
        return evaluation_view(row)

    return create_once(database, once, lambda: _check_evaluation(asked, ""), insert)


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
            return storage.read_bytes(storage.join(trained["model"]["uri"], CREDIT))
        except FileNotFoundError:
            pass
    why = "its model has none" if trained else "it is written when training is done"
    raise NotFound(f"job {job_id} has no credit record: {why}; the job is {status}", param="id", code="credit_not_found")


def page(
    database: Database, kind: str, after: str | None, limit: int, status: str | None, metadata: Mapping[str, str]
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
        open_jobs = update(Job).where(Job.id == job_id, Job.status.in_(UNFINISHED), Job.cancel_requested_at.is_(None))
        if update_one(session, open_jobs.values(cancel_requested_at=now, next_at=now)):
            journal.say(session, job_id, "cancel requested")
        session.expire_all()
        row = by_id(session, Job, job_id, kind)
        if row.status in ("succeeded", "failed"):
            raise Conflict(f"job {job_id} has {row.status} already", param="id", code=f"job_{row.status}")
        return VIEWS[kind](row)


def _row(job_id: str, kind: str, status: str, request: dict[str, Any]) -> Job:
    now = time.time()
    fresh = {"results": {}, "stage_seconds": {}, "attempt": 1, "journal_cursor": 0, "failures": 0}
    return Job(id=job_id, kind=kind, status=status, request=request, created_at=now, next_at=now, **fresh)


def _dataset(session: Session, asked: AlignmentJobCreate) -> Dataset:
    row = session.scalar(select(Dataset).where(Dataset.id == asked.dataset)) if is_id(asked.dataset) else None
    if row is None:
        raise NotFound(f"dataset: dataset {show(asked.dataset)} does not exist", param="dataset", code="dataset_not_found")
    size, held_out, pairs = asked.training.batch_size, asked.training.held_out_pairs, row.counts["pairs"]
    if size <= pairs < size + held_out:
        message = f"training.held_out_pairs: must leave training.batch_size = {size} of the {pairs} pairs, got {held_out}"
        raise BadRequest(message, param="training.held_out_pairs")
    if size > pairs:
        message = f"training.batch_size: must be at most the {pairs} pairs of dataset {row.id}, got {size}"
        raise BadRequest(message, param="training.batch_size")
    bad = row.counts.get("bad", {})  # what rows say; pictures are looked at when they are encoded
    check_bad(sum(bad.values()), row.counts["rows"], bad, asked.data.max_bad_fraction)
    return row


def _check_fit(base: ModelRecord, asked: AlignmentJobCreate) -> None:
    """Refuse timesteps that the base's schedule does not have, and adapters for layers that its U-Net does not have."""
    last, objective = registry.num_train_timesteps(base), asked.objective
    for field in ("t_min", "t_max", "calibration_bins"):
        if getattr(objective, field) > last:
            message = f"objective.{field}: must be at most the {last} timesteps of {base.name}, got {getattr(objective, field)}"
            raise BadRequest(message, param=f"objective.{field}")
    if asked.training.lora:
        if base.adapter_of:
            message = f"training.lora: must be null, {base.name} is LoRA adapters on {base.adapter_of.name} itself"
            raise BadRequest(message, param="training.lora")
        if idle := asked.training.lora.unmatched(registry.unet_layers(base.uri)):
            message = f"training.lora.targets: matches no linear or convolution layer of {base.name}'s U-Net, got {idle[0]!r}"
            raise BadRequest(message, param="training.lora.targets")


def _refuse_base_name(session: Session, name: str) -> None:
    if is_id(name):
        raise BadRequest(f"name: must not have the form of an id, got {name!r}", param="name")
    base = session.scalar(select(Model.id).where(Model.name == name, Model.base.is_(None)).limit(1))
    if base:
        raise BadRequest(f"name: belongs to the base model {base}, got {name!r}", param="name", code="name_taken")


def _check_evaluation(config: EvaluationConfig, at: str) -> None:
    """Refuse prompts that are not there, before a model is trained for them."""
    param = f"{at}prompts_uri"
    if len(set(config.scorers)) < len(config.scorers):
        raise BadRequest(f"{at}scorers: must not repeat, got {config.scorers}", param=f"{at}scorers")
    try:
        lines = storage.read_bytes(config.prompts_uri).decode().splitlines()
    except (OSError, ValueError) as error:  # a BadRequest for the URI's scheme is a ValueError too
        raise BadRequest(f"{param}: cannot be read, got {config.prompts_uri!r}: {error}", param=param) from error
    found = sum(1 for line in lines if line.strip())
    if found < config.num_prompts:
        message = f"{param}: {config.prompts_uri!r} holds {found} prompts, {at}num_prompts asks for {config.num_prompts}"
        raise BadRequest(message, param=param, code="too_few_prompts")
    if not config.scorers:
        return
    try:
        scorers.check([line for line in lines if line.strip()][: config.num_prompts], config.sample.height, config.sample.width)
    except DataError as error:
        raise BadRequest(f"{at}scorers: {error}", param=f"{at}scorers") from error
