"""/v1/models"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from services.api.requests import ModelCreate
from services.control import models
from services.control.dependencies import After, Config, Db, Key, Limit, body, takes
from services.control.idempotency import Once
from services.control.views import DeletedView, ListView, ModelView

router = APIRouter(tags=["models"])


@router.post("/v1/models", response_model=ModelView, openapi_extra=takes(ModelCreate))
def create_model(
    asked: Annotated[ModelCreate, Depends(body(ModelCreate))], db: Db, settings: Config, key: Key = None
) -> JSONResponse:
    """Register a base model: its components are checked, its digest recorded."""
    return JSONResponse(models.create(db, settings.storage_uri, Once.of(key, "/v1/models", asked), asked))


@router.get("/v1/models", response_model=ListView[ModelView])
def list_models(db: Db, after: After = None, limit: Limit = 20) -> JSONResponse:
    return JSONResponse(models.page(db, after, limit))


@router.get("/v1/models/{model_id}", response_model=ModelView)
def get_model(model_id: str, db: Db) -> JSONResponse:
    """The model of an id or a name."""
    return JSONResponse(models.get(db, model_id))


@router.delete("/v1/models/{model_id}", response_model=DeletedView)
def delete_model(model_id: str, db: Db, settings: Config) -> JSONResponse:
    """Forget a model that no unfinished job uses; an aligned model's weights go, a base's files stay."""
    return JSONResponse(models.delete(db, settings.storage_uri, model_id))
