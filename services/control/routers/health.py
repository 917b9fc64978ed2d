"""/healthz, /readyz, /metrics: for machines inside; no key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from services.control import health
from services.control.dependencies import Config, Db

router = APIRouter(tags=["health"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(request: Request, db: Db, settings: Config) -> JSONResponse:
    """Database, storage and Ray answer; 503 where one does not, and which."""
    ready, found = health.readiness(db, settings.storage_uri, request.app.state.launcher)
    return JSONResponse(found, 200 if ready else 503)


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Prometheus text."""
    return Response(request.app.state.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
