"""Finding one row by its id, and pages of rows, newest first."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from services.api.answers import Item, ListView
from services.control.problems import show
from services.control.tables import ApiKey, Dataset, Job, Model, Resource, Scorer
from services.errors import NotFound

Row = TypeVar("Row", bound=Resource)
_ID = re.compile(r"(ds|model|scorer|ajob|djob|eval|study|key)_[0-9a-f]{24}")
_NOUNS: dict[type[Resource], str] = {
    Dataset: "dataset",
    Model: "model",
    Scorer: "scorer",
    Job: "job",
    ApiKey: "key",
}


def is_id(text: str) -> bool:
    """Whether the text has the form of an id. Text of any other form is never looked up as one."""
    return _ID.fullmatch(text) is not None


def by_id(session: Session, table: type[Row], row_id: str, kind: str | None = None) -> Row:
    """The row with this id; a job must be of ``kind``, too. Raises NotFound."""
    row = session.scalar(select(table).where(table.id == row_id)) if is_id(row_id) else None
    has_kind = kind is None or (isinstance(row, Job) and row.kind == kind)
    if row is None or not has_kind:
        noun = kind if kind in ("evaluation", "study") else _NOUNS[table]
        raise NotFound(f"{noun} {show(row_id)} does not exist", param="id", code=f"{noun}_not_found")
    return row


def newest(
    session: Session, table: type[Row], query: Select[Row], after: str | None, limit: int, order: Any = None
) -> list[Row]:
    """Up to ``limit`` + 1 rows, newest first: the extra one shows that there is a next page.

    ``after`` is the id of the last row of the previous page. ``order`` is a column that equals the row's
    ``seq``. Raises NotFound for an ``after`` that does not exist.
    """
    order = table.seq if order is None else order
    if after is not None:
        seq = session.scalar(select(table.seq).where(table.id == after)) if is_id(after) else None
        if seq is None:
            raise NotFound(f"after: no such {_NOUNS[table]}, got {show(after)}", param="after")
        query = query.where(order < seq)
    return list(session.scalars(query.order_by(order.desc()).limit(limit + 1)))


def list_view(views: list[Item], limit: int) -> ListView[Item]:
    """One page: the first ``limit`` views. ``has_more`` is true if more were given."""
    return ListView(object="list", data=views[:limit], has_more=len(views) > limit)
