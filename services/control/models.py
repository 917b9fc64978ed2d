"""Models: registered bases, aligned models that jobs produced, and which model a name refers to."""

from __future__ import annotations

import time

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from services.api.answers import DeletedView, ListView, ModelView
from services.api.records import ModelRecord
from services.api.requests import ModelCreate
from services.artifacts import models
from services.artifacts.proof import Proof, prove
from services.control.database import ProjectDatabase
from services.control.idempotency import IdempotentRequest, create_once
from services.control.listing import is_id, list_view, newest
from services.control.problems import show
from services.control.tables import Job, Model, new_id
from services.control.transitions import UNFINISHED
from services.control.views import model_view
from services.errors import BadRequest, Conflict, NotFound
from services.storage import files


def create(
    database: ProjectDatabase, root: str, idempotent: IdempotentRequest, request: ModelCreate
) -> ModelView:
    """Register a base model.

    Raises BadRequest for a name that is taken, or a folder that is not proven to be a usable model.
    """
    if is_id(request.name):
        raise BadRequest(f"name: must not have the form of an id, got {request.name!r}", param="name")

    def inspect() -> tuple[Proof, str]:
        try:
            found = prove(request.uri, request.family)
            return found, models.folder_digest(request.uri, found.tensors)
        except OSError as error:
            raise BadRequest(f"uri: cannot be read, got {request.uri!r}: {error}", param="uri") from error

    def insert(session: Session, inspected: tuple[Proof, str]) -> ModelView:
        found, digest = inspected
        _refuse_taken_name(session, request.name)
        record = ModelRecord(
            id=new_id("model"),
            name=request.name,
            uri=files.as_uri(request.uri),
            family=found.family,
            digest=digest,
            lineage=found.lineage(),
            created_at=int(time.time()),
        )
        row = Model(**record.model_dump(), current=True)
        session.add(row)
        session.flush()
        models.publish(root, record)
        models.set_alias(root, record.name, record.id)
        return model_view(row)

    return create_once(database, idempotent, ModelView, inspect, insert)


def _refuse_taken_name(session: Session, name: str) -> None:
    """A name is taken by every model that has it and by every unfinished job whose model will get it."""
    model = session.scalar(select(Model.id).where(Model.name == name).limit(1))
    job = session.scalar(select(Job.id).where(Job.name == name, Job.status.in_(UNFINISHED)).limit(1))
    if model or job:
        raise BadRequest(f"name: is taken by {model or job}, got {name!r}", param="name", code="name_taken")


def find(session: Session, name_or_id: str, param: str) -> Model:
    """The model with this id, or the current one with this name.

    Raises NotFound; ``param`` is the request's field.
    """
    has_name = (Model.name == name_or_id) & Model.current
    matches = Model.id == name_or_id if is_id(name_or_id) else has_name
    row = session.scalar(select(Model).where(matches)) if "\0" not in name_or_id else None
    if row is None:
        message = f"{param}: model {show(name_or_id)} does not exist"
        raise NotFound(message, param=param, code="model_not_found")
    return row


def record_of(row: Model) -> ModelRecord:
    """The row as the record that Serve and the stages read."""
    columns = {name: getattr(row, name) for name in ModelRecord.model_fields if name != "created_at"}
    return ModelRecord(**columns, created_at=int(row.created_at))


def get(database: ProjectDatabase, name_or_id: str, param: str = "id") -> ModelView:
    """Raises NotFound; ``param`` is the request's field."""
    with database.read() as session:
        return model_view(find(session, name_or_id, param))


def page(database: ProjectDatabase, after: str | None, limit: int) -> ListView[ModelView]:
    """Models, newest first."""
    with database.read() as session:
        if after is not None and not is_id(after):
            after = find(session, after, "after").id
        rows = newest(session, Model, select(Model), after, limit)
        return list_view([model_view(row) for row in rows], limit)


def _unfinished_job(session: Session, model_id: str) -> str | None:
    """A job that reads the model or makes it, if any has not ended."""
    uses_it = or_(Job.model == model_id, Job.output_model == model_id)
    job = session.scalar(select(Job.id).where(uses_it, Job.status.in_(UNFINISHED)).limit(1))
    if job:
        return job
    evaluations = select(Job.id, Job.inputs).where(Job.kind == "evaluation", Job.status.in_(UNFINISHED))
    for evaluation, inputs in session.execute(evaluations):
        if any(model_id == each.get("id") for each in inputs["models"]):
            return str(evaluation)
    return None


def delete(database: ProjectDatabase, root: str, name_or_id: str) -> DeletedView:
    """Delete a model's registration, and an aligned model's weights; a base's files stay.

    Raises Conflict while an unfinished job uses it, or LoRA adapters need it.
    """
    with database.write(alone=True) as session:
        row = find(session, name_or_id, "id")
        model_id = row.id
        job = _unfinished_job(session, model_id)
        if job:
            message = f"model {model_id!r} is used by the unfinished job {job}"
            raise Conflict(message, param="id", code="in_use")
        modifies_it = (Model.base == model_id) & Model.adapter_of.is_not(None)
        adapters = session.scalar(select(Model.id).where(modifies_it).limit(1))
        if adapters:
            message = f"model {model_id!r} is needed by the LoRA adapters {adapters}; delete those first"
            raise Conflict(message, param="id", code="in_use")
        session.delete(row)
        session.flush()
        models.retract(root, record_of(row))
    return DeletedView(id=name_or_id, object="model", deleted=True)
