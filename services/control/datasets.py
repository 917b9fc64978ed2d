"""Datasets: registered pairs, counted and digested when they are registered, never changed afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.api.records import DatasetCounts, DatasetReport
from services.api.requests import DatasetCreate, DatasetSource
from services.control.database import Database
from services.control.idempotency import Once, create_once
from services.control.listing import by_id, listed, newest
from services.control.tables import Dataset, Job, new_id
from services.control.transitions import UNFINISHED
from services.control.views import dataset_view
from services.errors import Conflict
from services.pairs.columnar import unreadable
from services.pairs.source import Source, open_source
from services.pairs.validation import inspect, validate
from services.storage import files

Answer = TypeVar("Answer")


def create(database: Database, once: Once, asked: DatasetCreate) -> dict[str, Any]:
    """Read the rows without their pictures and register them. Raises BadRequest for files that cannot be used."""

    def insert(session: Session, inspected: tuple[DatasetCounts, str]) -> dict[str, Any]:
        counts, digest = inspected
        row = Dataset(
            id=new_id("ds"),
            name=asked.name,
            uri=files.as_uri(asked.uri),
            columns=dict(asked.columns),
            digest=digest,
            counts=counts.model_dump(),
            created_at=time.time(),
        )
        session.add(row)
        return dataset_view(row)

    return create_once(database, once, lambda: _read(asked, inspect), insert)


def report(asked: DatasetSource) -> DatasetReport:
    """Read a sample with its pictures; nothing is stored. Raises BadRequest for files that cannot be used."""
    return _read(asked, validate)


def _read(asked: DatasetSource, look: Callable[[Source], Answer]) -> Answer:
    try:
        return look(open_source(asked))
    except (pa.ArrowException, OSError) as error:  # a file that breaks half-way, or may not be read
        raise unreadable(error, asked.uri, "cannot be read") from error


def get(database: Database, dataset_id: str) -> dict[str, Any]:
    """Raises NotFound."""
    with database.read() as session:
        return dataset_view(by_id(session, Dataset, dataset_id))


def page(database: Database, after: str | None, limit: int) -> dict[str, Any]:
    """Datasets, newest first."""
    with database.read() as session:
        return listed(
            [dataset_view(row) for row in newest(session, Dataset, select(Dataset), after, limit)], limit
        )


def delete(database: Database, dataset_id: str) -> dict[str, Any]:
    """Forget a dataset; its files stay. Raises Conflict while a job uses it."""
    with database.write(alone=True) as session:
        row = by_id(session, Dataset, dataset_id)
        using = session.scalar(
            select(Job.id).where(Job.dataset == dataset_id, Job.status.in_(UNFINISHED)).limit(1)
        )
        if using:
            raise Conflict(
                f"dataset {dataset_id!r} is used by the unfinished job {using}", param="id", code="in_use"
            )
        session.delete(row)
    return {"id": dataset_id, "object": "dataset", "deleted": True}
