"""/v1/datasets"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from services.api.answers import DatasetView, DeletedView, ListView
from services.api.records import DatasetReport
from services.api.requests import DatasetCreate, DatasetSource
from services.control import datasets
from services.control.dependencies import READ, SUBMIT, After, Db, Key, Limit, body, takes
from services.control.idempotency import IdempotentRequest
from services.control.reading import READ_S, REGISTER_S, reads_sources

router = APIRouter(tags=["datasets"])


@router.post("/v1/datasets", openapi_extra=takes(DatasetCreate), dependencies=[SUBMIT])
@reads_sources(REGISTER_S)
def create_dataset(
    request: Annotated[DatasetCreate, Depends(body(DatasetCreate))],
    db: Db,
    key: Key = None,
) -> DatasetView:
    """Register preference pairs. Every row is read, checked, counted and digested; images are not."""
    return datasets.create(db, IdempotentRequest.of(key, "/v1/datasets", request), request)


@router.post("/v1/datasets/validate", openapi_extra=takes(DatasetSource), dependencies=[SUBMIT])
@reads_sources(READ_S)
def validate_dataset(request: Annotated[DatasetSource, Depends(body(DatasetSource))]) -> DatasetReport:
    """Check a sample of the rows and their images before registering them. Nothing is stored."""
    return datasets.report(request)


@router.get("/v1/datasets", dependencies=[READ])
def list_datasets(db: Db, after: After = None, limit: Limit = 20) -> ListView[DatasetView]:
    return datasets.page(db, after, limit)


@router.get("/v1/datasets/{dataset_id}", dependencies=[READ])
def get_dataset(dataset_id: str, db: Db) -> DatasetView:
    return datasets.get(db, dataset_id)


@router.delete("/v1/datasets/{dataset_id}", dependencies=[SUBMIT])
def delete_dataset(dataset_id: str, db: Db) -> DeletedView:
    """Delete the registration of a dataset that no unfinished job uses. Its files stay."""
    return datasets.delete(db, dataset_id)
