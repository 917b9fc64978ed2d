"""Models: bases that are registered, aligned ones that jobs made; and what a name means."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from dde_core.family import Family
from services.api.records import ModelRecord
from services.api.requests import ModelCreate
from services.artifacts import models
from services.control.database import Database
from services.control.idempotency import Once, create_once
from services.control.listing import by_id, is_id, listed, newest
from services.control.problems import show
from services.control.tables import Job, Model, new_id
from services.control.transitions import UNFINISHED
from services.control.views import model_view
from services.errors import BadRequest, Conflict, NotFound
from services.storage import files


def create(database: Database, root: str, once: Once, asked: ModelCreate) -> dict[str, Any]:
    """Register a base. Raises BadRequest for a folder that is no such pipeline, or a name that is taken."""
    if is_id(asked.name):
        raise BadRequest(f"name: must not have the form of an id, got {asked.name!r}", param="name")

    def look() -> tuple[Family, str]:
        try:
            return models.check_components(asked.uri, asked.family), models.folder_digest(asked.uri)
        except OSError as error:
            raise BadRequest(f"uri: cannot be read, got {asked.uri!r}: {error}", param="uri") from error

    def insert(session: Session, found: tuple[Family, str]) -> dict[str, Any]:
        family, digest = found
        _refuse_taken(session, asked.name)
        record = ModelRecord(
            id=new_id("model"),
            name=asked.name,
            uri=files.as_uri(asked.uri),
            family=family,
            digest=digest,
            created_at=int(time.time()),
        )
        row = Model(**record.model_dump(), current=True)
        session.add(row)
        session.flush()
        models.publish(root, record)
        models.point(root, record.name, record.id)
        return model_view(row)

    return create_once(database, once, look, insert)


def _refuse_taken(session: Session, name: str) -> None:
    """A name belongs to the models that have it and to the unfinished jobs that will give it."""
    model = session.scalar(select(Model.id).where(Model.name == name).limit(1))
    job = session.scalar(select(Job.id).where(Job.name == name, Job.status.in_(UNFINISHED)).limit(1))
    if model or job:
        raise BadRequest(f"name: is taken by {model or job}, got {name!r}", param="name", code="name_taken")


def find(session: Session, name_or_id: str, param: str) -> Model:
    """The model of an id or a name. Raises NotFound, naming it and the field that asked."""
    known = Model.id == name_or_id if is_id(name_or_id) else (Model.name == name_or_id) & Model.current
    row = session.scalar(select(Model).where(known)) if "\0" not in name_or_id else None
    if row is None:
        raise NotFound(
            f"{param}: model {show(name_or_id)} does not exist", param=param, code="model_not_found"
        )
    return row


def record_of(row: Model) -> ModelRecord:
    """The row as Serve and the stages know it."""
    return ModelRecord(
        **{name: getattr(row, name) for name in ModelRecord.model_fields if name != "created_at"},
        created_at=int(row.created_at),
    )


def get(database: Database, name_or_id: str) -> dict[str, Any]:
    """Raises NotFound."""
    with database.read() as session:
        return model_view(find(session, name_or_id, "id"))


def page(database: Database, after: str | None, limit: int) -> dict[str, Any]:
    """Models, newest first."""
    with database.read() as session:
        return listed([model_view(row) for row in newest(session, Model, select(Model), after, limit)], limit)


def delete(database: Database, root: str, model_id: str) -> dict[str, Any]:
    """Forget a model; an aligned one loses its weights, a base's files stay. Raises Conflict while a job uses it."""
    with database.write(alone=True) as session:
        row = by_id(session, Model, model_id)
        uses = or_(Job.model == model_id, Job.base == model_id, Job.output_model == model_id)
        using = session.scalar(select(Job.id).where(uses, Job.status.in_(UNFINISHED)).limit(1))
        if using:
            raise Conflict(
                f"model {model_id!r} is used by the unfinished job {using}", param="id", code="in_use"
            )
        adapters = session.scalar(
            select(Model.id).where(Model.base == model_id, Model.adapter_of.is_not(None)).limit(1)
        )
        if adapters:
            raise Conflict(
                f"model {model_id!r} is what the adapters {adapters} work on", param="id", code="in_use"
            )
        session.delete(row)
        session.flush()
        models.retract(root, record_of(row))
    return {"id": model_id, "object": "model", "deleted": True}
