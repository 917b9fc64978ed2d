"""/v1/datasets"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from services.api.answers import DatasetView, DeletedView, EventView, ListView
from services.api.records import DatasetReport
from services.api.requests import DatasetCreate, DatasetSource
from services.control import datasets, making
from services.control.dependencies import (
    READ,
    STORED,
    SUBMIT,
    After,
    Config,
    Db,
    Key,
    Limit,
    LongLimit,
    Root,
    body,
    takes,
)
from services.control.idempotency import IdempotentRequest
from services.control.reading import READ_S, REGISTER_S, reads_sources, reads_storage

router = APIRouter(tags=["datasets"])


@router.post("/v1/datasets", openapi_extra=takes(DatasetCreate), dependencies=[SUBMIT])
@reads_sources(REGISTER_S)
def create_dataset(
    request: Annotated[DatasetCreate, Depends(body(DatasetCreate))],
    db: Db,
    root: Root,
    settings: Config,
    key: Key = None,
) -> DatasetView:
    """Register preference pairs. Every row is read, checked, counted and digested; images are not.

    With ``generate`` or ``relabel``, scorers make the pairs: the answer has the status "generating".
    """
    idempotent = IdempotentRequest.of(key, "/v1/datasets", request)
    return datasets.create(db, root, settings, idempotent, request)


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


@router.delete("/v1/datasets/{dataset_id}", dependencies=[SUBMIT, STORED])
@reads_storage
def delete_dataset(dataset_id: str, db: Db, root: Root) -> DeletedView:
    """Delete the registration of a dataset that no unfinished job uses, and the files of one that scorers
    made; others stay.
    """
    return datasets.delete(db, root, dataset_id)


@router.get("/v1/datasets/{dataset_id}/events", dependencies=[READ])
def list_dataset_events(
    dataset_id: str, db: Db, after: After = None, limit: LongLimit = 100
) -> ListView[EventView]:
    """The events of the run that makes a dataset, in order of time; a registered dataset has none."""
    return making.list_events(db, dataset_id, after, limit)


@router.post("/v1/datasets/{dataset_id}/cancel", dependencies=[SUBMIT])
def cancel_dataset(dataset_id: str, db: Db) -> DatasetView:
    """Request that a dataset is not made. Its status becomes "failed" once its run has ended."""
    return making.cancel(db, dataset_id)
