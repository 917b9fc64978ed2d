"""/v1/evaluations"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from services.api.records import JobStatus
from services.api.requests import EvaluationCreate
from services.control import jobs, journal
from services.control.dependencies import After, Db, Key, Limit, LongLimit, body, takes
from services.control.idempotency import Once
from services.control.views import EvaluationView, EventView, ListView

router = APIRouter(tags=["evaluations"])
PATH = "/v1/evaluations"


@router.post(PATH, response_model=EvaluationView, openapi_extra=takes(EvaluationCreate))
def create_evaluation(
    asked: Annotated[EvaluationCreate, Depends(body(EvaluationCreate))], db: Db, key: Key = None
) -> JSONResponse:
    """Compare two registered models on held-out prompts."""
    return JSONResponse(jobs.create_evaluation(db, Once.of(key, PATH, asked), asked))


@router.get(PATH, response_model=ListView[EvaluationView])
def list_evaluations(
    db: Db, after: After = None, limit: Limit = 20, status: JobStatus | None = None
) -> JSONResponse:
    return JSONResponse(jobs.page(db, "evaluation", after, limit, status, {}))


@router.get(PATH + "/{evaluation_id}", response_model=EvaluationView)
def get_evaluation(evaluation_id: str, db: Db) -> JSONResponse:
    return JSONResponse(jobs.get(db, "evaluation", evaluation_id))


@router.get(PATH + "/{evaluation_id}/events", response_model=ListView[EventView])
def list_evaluation_events(
    evaluation_id: str, db: Db, after: After = None, limit: LongLimit = 100
) -> JSONResponse:
    """In order of time."""
    return JSONResponse(journal.list_events(db, "evaluation", evaluation_id, after, limit))


@router.post(PATH + "/{evaluation_id}/cancel", response_model=EvaluationView)
def cancel_evaluation(evaluation_id: str, db: Db) -> JSONResponse:
    return JSONResponse(jobs.cancel(db, "evaluation", evaluation_id))
