"""Datasets: preference pairs, counted and digested when they are registered and never changed afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.api.answers import DatasetView, DeletedView, ListView
from services.api.records import DatasetReport
from services.api.requests import DatasetCreate, DatasetSource
from services.control.database import ProjectDatabase
from services.control.idempotency import IdempotentRequest, create_once
from services.control.listing import by_id, list_view, newest
from services.control.tables import Dataset, Job, new_id
from services.control.transitions import UNFINISHED
from services.control.views import dataset_view
from services.errors import Conflict
from services.pairs.columnar import unreadable
from services.pairs.source import Source, open_source
from services.pairs.validation import Inspection, inspect, validate
from services.storage import files

Findings = TypeVar("Findings")


def create(database: ProjectDatabase, idempotent: IdempotentRequest, request: DatasetCreate) -> DatasetView:
    """Read all rows, without their images, and register them. Raises BadRequest for unusable files."""

    def insert(session: Session, inspected: tuple[Inspection, str | None]) -> DatasetView:
        (counts, digest, example), split = inspected
        row = Dataset(
            id=new_id("ds"),
            name=request.name,
            uri=files.as_uri(request.uri),
            split=split,
            columns=dict(request.columns),
            digest=digest,
            counts=counts.model_dump(),
            example=example.model_dump(),
            created_at=time.time(),
        )
        session.add(row)
        return dataset_view(row)

    return create_once(database, idempotent, DatasetView, lambda: _read(request, _inspected), insert)


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
        return dataset_view(by_id(session, Dataset, dataset_id))


def page(database: ProjectDatabase, after: str | None, limit: int) -> ListView[DatasetView]:
    """Datasets, newest first."""
    with database.read() as session:
        rows = newest(session, Dataset, select(Dataset), after, limit)
        return list_view([dataset_view(row) for row in rows], limit)


def delete(database: ProjectDatabase, dataset_id: str) -> DeletedView:
    """Delete a dataset's registration; its files stay. Raises Conflict while an unfinished job uses it."""
    with database.write(alone=True) as session:
        row = by_id(session, Dataset, dataset_id)
        uses_it = (Job.dataset == dataset_id) & Job.status.in_(UNFINISHED)
        job = session.scalar(select(Job.id).where(uses_it).limit(1))
        if job:
            message = f"dataset {dataset_id!r} is used by the unfinished job {job}"
            raise Conflict(message, param="id", code="in_use")
        session.delete(row)
    return DeletedView(id=dataset_id, object="dataset", deleted=True)
