"""/v1/models"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from services.api.answers import DeletedView, ListView, ModelView
from services.api.requests import ModelCreate, Promote
from services.control import models, promotion
from services.control.dependencies import (
    READ,
    STORED,
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
from services.control.reading import REGISTER_S, reads_sources, reads_storage

router = APIRouter(tags=["models"])


@router.post("/v1/models", openapi_extra=takes(ModelCreate), dependencies=[SUBMIT, STORED])
@reads_sources(REGISTER_S)
def create_model(
    request: Annotated[ModelCreate, Depends(body(ModelCreate))],
    db: Db,
    root: Root,
    key: Key = None,
) -> ModelView:
    """Register a base model. Its components are checked and its digest is recorded."""
    return models.create(db, root, IdempotentRequest.of(key, "/v1/models", request), request)


@router.get("/v1/models", dependencies=[READ])
def list_models(db: Db, after: After = None, limit: Limit = 20) -> ListView[ModelView]:
    return models.page(db, after, limit)


@router.get("/v1/models/{model_id}", dependencies=[READ])
def get_model(model_id: str, db: Db) -> ModelView:
    """Look up a model by id or name."""
    return models.get(db, model_id)


@router.post("/v1/models/{model_id}/promote", openapi_extra=takes(Promote), dependencies=[SUBMIT, STORED])
@reads_storage
def promote_model(
    model_id: str, request: Annotated[Promote, Depends(body(Promote))], db: Db, root: Root
) -> ModelView:
    """Let the model's name with an alias, such as ``NAME@production``, refer to this version.

    Requests for images that come from now on get it. Promote an earlier version to roll back.
    """
    return promotion.promote(db, root, model_id, request)


@router.delete("/v1/models/{model_id}", dependencies=[SUBMIT, STORED])
@reads_storage
def delete_model(model_id: str, db: Db, root: Root) -> DeletedView:
    """Delete a model that no unfinished job uses.

    An aligned model's weights are deleted; a base model's files stay.
    """
    return models.delete(db, root, model_id)
