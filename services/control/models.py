"""Models: registered bases, aligned models that jobs produced, and which model a name refers to."""

from __future__ import annotations

import time
from collections.abc import Iterable

from sqlalchemy import ColumnElement, ScalarSelect, false, func, or_, select
from sqlalchemy import delete as delete_rows
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
from services.control.tables import Job, Model, Promotion, new_id
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
        refuse_taken_name(session, request.name)
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


def refuse_taken_name(session: Session, name: str) -> None:
    """Raises BadRequest. A name is taken by every model that has it and by every unfinished job whose model
    will get it.
    """
    model = session.scalar(select(Model.id).where(Model.name == name).limit(1))
    gets_it = (Job.name == name) & (Job.kind == "alignment")
    job = session.scalar(select(Job.id).where(gets_it, Job.status.in_(UNFINISHED)).limit(1))
    if model or job:
        raise BadRequest(f"name: is taken by {model or job}, got {name!r}", param="name", code="name_taken")


def find(session: Session, name_or_id: str, param: str) -> Model:
    """The model with this id, the current one with this name, or the one that "name@alias" refers to.

    Raises NotFound; ``param`` is the request's field.
    """
    name, at, alias = name_or_id.partition("@")
    matches: ColumnElement[bool]
    if "\0" in name_or_id:
        matches = false()
    elif at:
        matches = Model.id == _promoted(name, alias)
    elif is_id(name):
        matches = Model.id == name
    else:
        matches = (Model.name == name) & Model.current
    row = session.scalar(select(Model).where(matches))
    if row is None:
        message = f"{param}: model {show(name_or_id)} does not exist"
        raise NotFound(message, param=param, code="model_not_found")
    return row


def _promoted(name: str, alias: str) -> ScalarSelect[str]:
    """The id of the model that "name@alias" refers to."""
    of_alias = select(Promotion.model).where(Promotion.name == name, Promotion.alias == alias)
    return of_alias.order_by(Promotion.seq.desc()).limit(1).scalar_subquery()


def aliases(session: Session, rows: Iterable[Model]) -> dict[str, list[str]]:
    """The aliases that refer to each of the models, by id."""
    names = {row.name for row in rows}
    newest_of = select(func.max(Promotion.seq)).where(Promotion.name.in_(names))
    newest_of = newest_of.group_by(Promotion.name, Promotion.alias)
    found: dict[str, list[str]] = {}
    for row in session.scalars(select(Promotion).where(Promotion.seq.in_(newest_of))):
        found.setdefault(row.model, []).append(row.alias)
    return {model: sorted(names) for model, names in found.items()}


def record_of(row: Model) -> ModelRecord:
    """The row as the record that Serve and the stages read."""
    columns = {name: getattr(row, name) for name in ModelRecord.model_fields if name != "created_at"}
    return ModelRecord(**columns, created_at=int(row.created_at))


def get(database: ProjectDatabase, name_or_id: str, param: str = "id") -> ModelView:
    """Raises NotFound; ``param`` is the request's field."""
    with database.read() as session:
        row = find(session, name_or_id, param)
        return model_view(row, aliases(session, [row]).get(row.id, ()))


def page(database: ProjectDatabase, after: str | None, limit: int) -> ListView[ModelView]:
    """Models, newest first."""
    with database.read() as session:
        if after is not None and not is_id(after):
            after = find(session, after, "after").id
        rows = newest(session, Model, select(Model), after, limit)
        of_rows = aliases(session, rows)
        return list_view([model_view(row, of_rows.get(row.id, ())) for row in rows], limit)


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
        promoted = aliases(session, [row]).get(model_id)
        if promoted:
            names = ", ".join(f"{row.name}@{alias}" for alias in promoted)
            message = f"model {model_id!r} is {names}; promote another version first"
            raise Conflict(message, param="id", code="in_use")
        session.execute(delete_rows(Promotion).where(Promotion.model == model_id))
        session.delete(row)
        session.flush()
        models.retract(root, record_of(row))
    return DeletedView(id=name_or_id, object="model", deleted=True)
