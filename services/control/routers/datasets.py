"""/v1/datasets"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from services.api.records import DatasetReport
from services.api.requests import DatasetCreate, DatasetSource
from services.control import datasets
from services.control.dependencies import After, Db, Key, Limit, body, takes
from services.control.idempotency import Once
from services.control.views import DatasetView, DeletedView, ListView

router = APIRouter(tags=["datasets"])


@router.post("/v1/datasets", response_model=DatasetView, openapi_extra=takes(DatasetCreate))
def create_dataset(
    asked: Annotated[DatasetCreate, Depends(body(DatasetCreate))], db: Db, key: Key = None
) -> JSONResponse:
    """Register preference pairs: every row is read, checked, counted and digested; pictures are not."""
    return JSONResponse(datasets.create(db, Once.of(key, "/v1/datasets", asked), asked))


@router.post("/v1/datasets/validate", response_model=DatasetReport, openapi_extra=takes(DatasetSource))
def validate_dataset(asked: Annotated[DatasetSource, Depends(body(DatasetSource))]) -> JSONResponse:
    """What a sample of the rows and their pictures shows; nothing is stored."""
    return JSONResponse(datasets.report(asked).model_dump())


@router.get("/v1/datasets", response_model=ListView[DatasetView])
def list_datasets(db: Db, after: After = None, limit: Limit = 20) -> JSONResponse:
    return JSONResponse(datasets.page(db, after, limit))


@router.get("/v1/datasets/{dataset_id}", response_model=DatasetView)
def get_dataset(dataset_id: str, db: Db) -> JSONResponse:
    return JSONResponse(datasets.get(db, dataset_id))


@router.delete("/v1/datasets/{dataset_id}", response_model=DeletedView)
def delete_dataset(dataset_id: str, db: Db) -> JSONResponse:
    """Forget a dataset that no unfinished job uses; its files stay."""
    return JSONResponse(datasets.delete(db, dataset_id))
