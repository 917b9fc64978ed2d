"""Scorers: built-in ones, which every project has, and those that a project registered."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from dde_core.errors import DdeError
from services.api.answers import DeletedView, ListView, ScorerView
from services.api.records import ScorerRecord
from services.api.requests import ScorerCreate
from services.artifacts import scorers
from services.artifacts.scorers import BUILT_IN
from services.control.database import ProjectDatabase
from services.control.idempotency import IdempotentRequest, create_once
from services.control.listing import is_id, list_view, newest
from services.control.problems import show
from services.control.tables import Job, Scorer, new_id
from services.control.transitions import UNFINISHED
from services.control.views import scorer_view
from services.errors import BadRequest, Conflict, NotFound, ServiceError
from services.storage import files, sources

RESERVED = "held_out_"
"""How the names of validation's own metrics begin."""
_BUILT_IN_IDS = {record.id: record for record in BUILT_IN.values()}


def create(
    database: ProjectDatabase, root: str, idempotent: IdempotentRequest, request: ScorerCreate
) -> ScorerView:
    """Register a scorer.

    Raises BadRequest for a name that is taken and for files that are not proven to be those of a scorer of
    the kind, NotFound for files that do not exist.
    """
    _check_fields(request)

    def inspect() -> str:
        with database.read() as session:
            _refuse_taken_name(session, request.name)
        return _prove(request)

    def insert(session: Session, digest: str) -> ScorerView:
        _refuse_taken_name(session, request.name)
        record = ScorerRecord(
            id=new_id("scorer"),
            name=request.name,
            kind=request.kind,
            uri=files.as_uri(request.uri),
            processor=files.as_uri(request.processor) if request.processor else None,
            resize=request.resize,
            digest=digest,
            created_at=int(time.time()),
        )
        session.add(Scorer(**record.model_dump()))
        session.flush()
        scorers.publish(root, record)
        return scorer_view(record)

    return create_once(database, idempotent, ScorerView, inspect, insert)


def _check_fields(request: ScorerCreate) -> None:
    """Refuse a name that no scorer may have, and a setting that the kind does not have."""
    if is_id(request.name):
        raise BadRequest(f"name: must not have the form of an id, got {request.name!r}", param="name")
    if request.name in BUILT_IN or request.name in _BUILT_IN_IDS:
        message = f"name: belongs to a built-in scorer, got {request.name!r}"
        raise BadRequest(message, param="name", code="name_taken")
    if request.name.startswith(RESERVED):
        message = (
            f"name: must not begin with {RESERVED}, as validation's own metrics do, got {request.name!r}"
        )
        raise BadRequest(message, param="name")
    if request.resize != "antialiased" and request.kind != "hps":
        message = f"resize: only the kind hps has a choice, got {request.resize!r} for {request.kind}"
        raise BadRequest(message, param="resize")


def _refuse_taken_name(session: Session, name: str) -> None:
    scorer = session.scalar(select(Scorer.id).where(Scorer.name == name))
    if scorer:
        raise BadRequest(f"name: is taken by {scorer}, got {name!r}", param="name", code="name_taken")


def _prove(request: ScorerCreate) -> str:
    """The digest of the files, once they are proven to be those of a scorer of the kind."""
    _check_source(request.uri, "uri")
    if request.processor:
        _check_source(request.processor, "processor")
    try:
        scorers.prove(request.kind, request.uri, request.processor, request.resize)
        return scorers.digest_of(request.uri, request.processor)
    except DdeError as error:
        message = f"uri {request.uri!r} is not a scorer of kind {request.kind}: {error}"
        raise BadRequest(message, param="uri", code="unusable_scorer") from error
    except OSError as error:
        raise BadRequest(f"uri: cannot be read, got {request.uri!r}: {error}", param="uri") from error


def _check_source(uri: str, param: str) -> None:
    """Refuse what does not exist or may not be opened."""
    try:
        sources.check_files(uri)
    except ServiceError as error:
        raise type(error)(f"{param}: {error}", param=param, code=error.code) from error


def find(session: Session, name_or_id: str, param: str) -> ScorerRecord:
    """The scorer with this name or id. Raises NotFound; ``param`` is the request's field."""
    built_in = BUILT_IN.get(name_or_id) or _BUILT_IN_IDS.get(name_or_id)
    if built_in:
        return built_in
    matches = Scorer.id == name_or_id if is_id(name_or_id) else Scorer.name == name_or_id
    row = session.scalar(select(Scorer).where(matches)) if "\0" not in name_or_id else None
    if row is None:
        message = f"{param}: scorer {show(name_or_id)} does not exist"
        raise NotFound(message, param=param, code="scorer_not_found")
    return record_of(row)


def record_of(row: Scorer) -> ScorerRecord:
    """The row as the record that Serve and the stages read."""
    columns = {name: getattr(row, name) for name in ScorerRecord.model_fields if name != "created_at"}
    return ScorerRecord(**columns, created_at=int(row.created_at))


def of_names(session: Session, names: list[str], field: str) -> list[ScorerRecord]:
    """The scorers that a request's ``field`` names.

    Raises NotFound for one that the project does not have, BadRequest for one that is named twice or by its
    id: results, gates and weights go by names.
    """
    if len(set(names)) < len(names):
        raise BadRequest(f"{field}: must not repeat, got {names}", param=field)
    found = [find(session, name, f"{field}.{i}") for i, name in enumerate(names)]
    for i, (name, record) in enumerate(zip(names, found, strict=True)):
        if name != record.name:
            message = f"{field}.{i}: must be the name of a scorer, got the id of {record.name!r}: {name!r}"
            raise BadRequest(message, param=f"{field}.{i}")
    return found


def check_names(database: ProjectDatabase, names: list[str], field: str) -> None:
    """Raises like ``of_names``."""
    with database.read() as session:
        of_names(session, names, field)


def get(database: ProjectDatabase, name_or_id: str) -> ScorerView:
    """Raises NotFound."""
    with database.read() as session:
        return scorer_view(find(session, name_or_id, "id"))


def page(database: ProjectDatabase, after: str | None, limit: int) -> ListView[ScorerView]:
    """Scorers, newest first; the built-in ones are the oldest. Raises NotFound for an unknown ``after``."""
    built_in = list(BUILT_IN.values())
    with database.read() as session:
        last = find(session, after, "after") if after is not None else None
        if last in built_in:
            return list_view(_views(built_in[built_in.index(last) + 1 :]), limit)
        rows = newest(session, Scorer, select(Scorer), last.id if last else None, limit)
        return list_view(_views([*map(record_of, rows), *built_in]), limit)


def _views(records: list[ScorerRecord]) -> list[ScorerView]:
    return [scorer_view(record) for record in records]


def _used(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the scorers that a job evaluates with, ranks with or is rewarded by."""
    return [*inputs.get("scorers", ()), *inputs.get("rewards", ())]


def delete(database: ProjectDatabase, root: str, name_or_id: str) -> DeletedView:
    """Delete a scorer's registration; its files stay.

    Raises Conflict for a built-in scorer, and while an unfinished job or evaluation uses it.
    """
    with database.write(alone=True) as session:
        record = find(session, name_or_id, "id")
        if record.name in BUILT_IN:
            message = f"scorer {record.name!r} is built in and cannot be deleted"
            raise Conflict(message, param="id", code="built_in")
        unfinished = session.execute(select(Job.id, Job.inputs).where(Job.status.in_(UNFINISHED)))
        for job, inputs in unfinished:
            if any(used["id"] == record.id for used in _used(inputs)):
                message = f"scorer {record.name!r} is used by the unfinished {job}"
                raise Conflict(message, param="id", code="in_use")
        session.delete(session.scalars(select(Scorer).where(Scorer.id == record.id)).one())
        session.flush()
        scorers.retract(root, record)
    return DeletedView(id=name_or_id, object="scorer", deleted=True)
