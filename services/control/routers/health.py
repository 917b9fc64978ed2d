"""/healthz, /readyz, /metrics: for load balancers and Prometheus; no API key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from services.api.answers import ReadyView
from services.control import health
from services.control.dependencies import AllProjects, Config

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Liveness: the process answers, however busy its threads are."""
    return {"status": "ok"}


@router.get("/readyz", response_model=ReadyView, responses={503: {"model": ReadyView}})
def readyz(request: Request, db: AllProjects, settings: Config) -> JSONResponse:
    """Readiness: database, storage and Ray answer. 503 names the one that does not."""
    report = health.readiness(db, settings.storage_uri, request.app.state.launcher)
    return JSONResponse(report.model_dump(), 200 if report.status == "ready" else 503)


@router.get("/metrics", response_class=Response, responses=TEXT)
def metrics(request: Request) -> Response:
    """Metrics in the Prometheus text format."""
    return Response(request.app.state.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
