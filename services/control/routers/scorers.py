"""/v1/scorers"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from services.api.answers import DeletedView, ListView, ScorerView
from services.api.requests import ScorerCreate
from services.control import scorers
from services.control.dependencies import (
    READ,
    SUBMIT,
    After,
    Db,
    Key,
    Limit,
    Root,
    body,
    takes,
)
from services.control.idempotency import IdempotentRequest
from services.control.reading import REGISTER_S, reads_sources

router = APIRouter(tags=["scorers"])
PATH = "/v1/scorers"


@router.post(PATH, openapi_extra=takes(ScorerCreate), dependencies=[SUBMIT])
@reads_sources(REGISTER_S)
def create_scorer(
    request: Annotated[ScorerCreate, Depends(body(ScorerCreate))],
    db: Db,
    root: Root,
    key: Key = None,
) -> ScorerView:
    """Register a scorer. Its files are checked against its kind and its digest is recorded."""
    return scorers.create(db, root, IdempotentRequest.of(key, PATH, request), request)


@router.get(PATH, dependencies=[READ])
def list_scorers(db: Db, after: After = None, limit: Limit = 20) -> ListView[ScorerView]:
    """The project's scorers, newest first, then the built-in ones."""
    return scorers.page(db, after, limit)


@router.get(PATH + "/{scorer_id}", dependencies=[READ])
def get_scorer(scorer_id: str, db: Db) -> ScorerView:
    """Look up a scorer by id or name."""
    return scorers.get(db, scorer_id)


@router.delete(PATH + "/{scorer_id}", dependencies=[SUBMIT])
def delete_scorer(scorer_id: str, db: Db, root: Root) -> DeletedView:
    """Delete a scorer that no unfinished job or evaluation uses. Its files stay."""
    return scorers.delete(db, root, scorer_id)
