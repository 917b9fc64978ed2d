"""/healthz, /readyz, /metrics: for load balancers and Prometheus; no API key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from services.control import health
from services.control.dependencies import AllProjects, Config

router = APIRouter(tags=["health"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """Liveness: the process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(request: Request, db: AllProjects, settings: Config) -> JSONResponse:
    """Readiness: database, storage and Ray answer. 503 names the one that does not."""
    ready, report = health.readiness(db, settings.storage_uri, request.app.state.launcher)
    return JSONResponse(report, 200 if ready else 503)


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Metrics in the Prometheus text format."""
    return Response(request.app.state.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
