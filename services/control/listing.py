"""Finding one row by its id, and pages of rows, newest first."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from services.control.problems import show
from services.control.tables import Dataset, Job, Model, Resource
from services.errors import BadRequest, NotFound

Row = TypeVar("Row", bound=Resource)
_SHAPE = re.compile(r"(ds|model|ajob|eval)_[0-9a-f]{24}")
_CALLED: dict[type[Resource], str] = {Dataset: "dataset", Model: "model", Job: "job"}


def is_id(text: str) -> bool:
    """Has it the form of an id? What has not is never looked up."""
    return _SHAPE.fullmatch(text) is not None


def by_id(session: Session, table: type[Row], row_id: str, kind: str | None = None) -> Row:
    """The row with this id (of this kind, for jobs). Raises NotFound, naming it."""
    row = session.scalar(select(table).where(table.id == row_id)) if is_id(row_id) else None
    if row is None or (kind is not None and row.kind != kind):  # type: ignore[attr-defined]
        called = "evaluation" if kind == "evaluation" else _CALLED[table]
        raise NotFound(f"{called} {show(row_id)} does not exist", param="id", code=f"{called}_not_found")
    return row


def newest(
    session: Session, table: type[Row], query: Select[Row], after: str | None, limit: int, order: Any = None
) -> list[Row]:
    """One row more than ``limit``, so that the caller sees whether there is more.

    ``after`` is the id of the last row seen, ``order`` a column that holds the row's ``seq`` too.
    """
    order = table.seq if order is None else order
    if after is not None:
        seq = session.scalar(select(table.seq).where(table.id == after)) if is_id(after) else None
        if seq is None:
            raise BadRequest(f"after: no such {_CALLED[table]}, got {show(after)}", param="after")
        query = query.where(order < seq)
    return list(session.scalars(query.order_by(order.desc()).limit(limit + 1)))


def listed(views: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """The list object of the API."""
    return {"object": "list", "data": views[:limit], "has_more": len(views) > limit}
