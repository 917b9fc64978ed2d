"""Datasets: preference pairs, counted and digested when they are registered and never changed afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from services.api.answers import DatasetView, DeletedView, ListView
from services.api.records import DatasetReport
from services.api.requests import DatasetCreate, DatasetSource
from services.control import making
from services.control.database import ProjectDatabase
from services.control.idempotency import IdempotentRequest, create_once
from services.control.listing import by_id, list_view, newest
from services.control.tables import Dataset, Job, new_id
from services.control.transitions import UNFINISHED
from services.control.views import dataset_view
from services.errors import BadRequest, Conflict
from services.pairs.columnar import unreadable
from services.pairs.source import Source, open_source
from services.pairs.validation import Inspection, inspect, validate
from services.settings import Settings
from services.stages import layout
from services.storage import files

Findings = TypeVar("Findings")


WAYS = ("uri", "generate", "relabel")


def create(
    database: ProjectDatabase,
    root: str,
    settings: Settings,
    idempotent: IdempotentRequest,
    request: DatasetCreate,
) -> DatasetView:
    """Register pairs that exist, or start a run that makes some.

    Raises BadRequest for unusable files and for a request that does not say which; else as ``making.create``.
    """
    given = [name for name in WAYS if getattr(request, name) is not None]
    if len(given) != 1:
        message = f"{given[-1] if given else 'uri'}: give one of {', '.join(WAYS)}, got {given or 'none'}"
        raise BadRequest(message, param=given[-1] if given else "uri")
    if request.uri is not None:
        _refuse_made(root, request.uri)
        source = DatasetSource(uri=request.uri, columns=request.columns, split=request.split)
        return _register(database, idempotent, request.name, source)
    for field in ("columns", "split"):
        if getattr(request, field):
            message = f"{field}: is not read beside {given[0]}, got {getattr(request, field)!r}"
            raise BadRequest(message, param=field)
    return making.create(database, root, settings, idempotent, request)


def _refuse_made(root: str, uri: str) -> None:
    """Raises BadRequest for the files of datasets that scorers made: a run may be writing them."""
    if f"{files.as_uri(uri)}/".startswith(f"{layout.all_made_folder(root)}/"):
        message = f"uri: lies in a dataset that scorers made, got {uri!r}; jobs take its id"
        raise BadRequest(message, param="uri", code="made_by_scorers")


def _register(
    database: ProjectDatabase, idempotent: IdempotentRequest, name: str, source: DatasetSource
) -> DatasetView:
    """Read all rows, without their images, and register them. Raises BadRequest for unusable files."""

    def insert(session: Session, inspected: tuple[Inspection, str | None]) -> DatasetView:
        (counts, digest, example), split = inspected
        row = Dataset(
            id=new_id("ds"),
            name=name,
            uri=files.as_uri(source.uri),
            split=split,
            columns=dict(source.columns),
            digest=digest,
            counts=counts.model_dump(),
            example=example.model_dump(),
            created_at=time.time(),
        )
        session.add(row)
        return dataset_view(row)

    return create_once(database, idempotent, DatasetView, lambda: _read(source, _inspected), insert)


def _inspected(source: Source) -> tuple[Inspection, str | None]:
    """What is found, and the split that is read."""
    return inspect(source), source.split


def report(source: DatasetSource) -> DatasetReport:
    """Read a sample of the rows with their images; store nothing. Raises BadRequest for unusable files."""
    return _read(source, validate)


def _read(source: DatasetSource, read: Callable[[Source], Findings]) -> Findings:
    try:
        return read(open_source(source))
    except (pa.ArrowException, OSError) as error:  # a truncated file, or no permission
        raise unreadable(error, source.uri, "cannot be read") from error


def get(database: ProjectDatabase, dataset_id: str) -> DatasetView:
    """Raises NotFound."""
    with database.read() as session:
        row = by_id(session, Dataset, dataset_id)
        return dataset_view(row, making.job_of(session, row))


def page(database: ProjectDatabase, after: str | None, limit: int) -> ListView[DatasetView]:
    """Datasets, newest first."""
    with database.read() as session:
        rows = newest(session, Dataset, select(Dataset), after, limit)
        jobs = making.jobs_of(session, rows)
        return list_view([dataset_view(row, jobs.get(row.job)) for row in rows], limit)


def delete(database: ProjectDatabase, root: str, dataset_id: str) -> DeletedView:
    """Delete a dataset's registration, and the files of one that scorers made; others stay.

    Raises Conflict while an unfinished job uses it or makes it.
    """
    with database.write(alone=True) as session:
        row = by_id(session, Dataset, dataset_id)
        uses_it = or_(Job.dataset == dataset_id, Job.id == row.job) & Job.status.in_(UNFINISHED)
        job = session.scalar(select(Job.id).where(uses_it).limit(1))
        if job:
            message = f"dataset {dataset_id!r} is used by the unfinished job {job}"
            raise Conflict(message, param="id", code="in_use")
        session.delete(row)
        is_made = row.job is not None
    if is_made:  # not in the transaction: others would wait for it, and nobody can find the files any more
        files.delete_folder(layout.made_folder(root, dataset_id))
    return DeletedView(id=dataset_id, object="dataset", deleted=True)
