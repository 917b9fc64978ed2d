"""/healthz, /readyz, /metrics: for load balancers and Prometheus; no API key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from services.api.answers import ReadyView
from services.control import health

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
router = APIRouter(tags=["health"])
metrics_router = APIRouter(tags=["health"])
"""Left out where the metrics have a port of their own."""


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Liveness: the process answers, however busy its threads are."""
    return {"status": "ok"}


@router.get("/readyz", response_model=ReadyView, responses={503: {"model": ReadyView}})
async def readyz(request: Request) -> JSONResponse:
    """Readiness: 200 while this replica can answer. The body says which parts are away."""
    state = request.app.state
    report = health.readiness(state.parts, state.drain)
    return JSONResponse(report.model_dump(), 200 if report.status == "ready" else 503)


@metrics_router.get("/metrics", response_class=Response, responses=TEXT)
def metrics(request: Request) -> Response:
    """Metrics in the Prometheus text format."""
    return Response(request.app.state.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
