"""The FastAPI app: its routes and shared objects, and what starts and stops with it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool

from services.api.answers import ErrorView
from services.api.images import ImageRequest, ScoreRequest
from services.api.requests import (
    DEFAULT_PROJECT,
    AlignmentJobCreate,
    DatasetCreate,
    DatasetSource,
    EvaluationCreate,
    KeyCreate,
    ModelCreate,
    Promote,
    ScorerCreate,
    StudyCreate,
)
from services.control import image_files as images_by_url
from services.control import inference, problems, schema
from services.control.database import Database
from services.control.draining import Drain
from services.control.health import Parts
from services.control.launchers.clusters import Clusters
from services.control.launchers.contract import Launcher
from services.control.middleware import Observed
from services.control.reconciler import Reconciler
from services.control.routers import (
    datasets,
    evaluations,
    health,
    image_files,
    images,
    jobs,
    keys,
    models,
    scorers,
    studies,
)
from services.control.stages import source_rules
from services.control.telemetry import Telemetry
from services.control.waiting_metrics import WaitingJobs
from services.settings import Settings
from services.storage import files, sources

SWEEP_STOP_S = 2.0
"""How long the end waits for a sweep of images: its connection goes back before the database is closed."""

BODIES = (
    DatasetCreate,
    DatasetSource,
    ModelCreate,
    ScorerCreate,
    AlignmentJobCreate,
    EvaluationCreate,
    StudyCreate,
    ImageRequest,
    ScoreRequest,
    KeyCreate,
    Promote,
)


def build_app(settings: Settings, launcher: Launcher | None = None, *, reconcile: bool = True) -> FastAPI:
    """The control plane, not started: its lifespan opens the database and starts the reconciler.

    With ``reconcile=False`` it answers requests and leaves the jobs to other replicas.
    """
    app = FastAPI(title="dde", version="1", lifespan=_lifespan, docs_url=None, redoc_url=None)
    settings = settings.model_copy(update={"storage_uri": files.as_uri(settings.storage_uri)})
    app.state.settings = settings
    app.state.clusters = Clusters(launcher) if launcher else Clusters.of(settings)
    app.state.launcher = app.state.clusters.shared
    app.state.database = Database.of(settings)
    app.state.reconcile = reconcile
    app.state.reconciler = Reconciler(app.state.database, settings, app.state.clusters)
    app.state.parts = Parts(app.state.database, settings, app.state.launcher)
    app.state.drain = Drain()
    app.state.telemetry = Telemetry(app.state.database, app.state.parts, app.state.reconciler)
    app.state.telemetry.register(WaitingJobs(app.state.database, settings))
    app.add_middleware(Observed, telemetry=app.state.telemetry, drain=app.state.drain)
    problems.install(app)
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorView} for status in ("4XX", "5XX")}
    for each in (health, datasets, models, scorers, jobs, evaluations, studies, images, image_files, keys):
        app.include_router(each.router, responses=errors)
    if settings.metrics_port is None:
        app.include_router(health.metrics_router, responses=errors)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state = app.state
    sources.hold_to(source_rules(state.settings, DEFAULT_PROJECT))
    await run_in_threadpool(schema.prepare, state.database, may_migrate=state.settings.migrate)
    with ExitStack() as undo:
        undo.callback(state.database.close)
        if state.settings.metrics_port is not None:
            metrics = state.telemetry.listen(state.settings.host, state.settings.metrics_port)
            undo.callback(metrics.server_close)
            undo.callback(metrics.shutdown)
        state.parts.start()
        undo.callback(state.parts.stop)
        if state.reconcile:
            state.reconciler.start()
        stopping = threading.Event()
        sweeping = (stopping, state.settings, state.database)
        sweep = threading.Thread(target=images_by_url.sweep_until, args=sweeping, name="sweep", daemon=True)
        sweep.start()
        undo.callback(sweep.join, SWEEP_STOP_S)
        undo.callback(stopping.set)
        try:
            async with inference.make_client(state.settings.serve_url) as state.serve:
                yield
        finally:
            await run_in_threadpool(state.reconciler.stop)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document plus the request bodies, which ``dependencies.body`` reads instead of FastAPI."""
    if not app.openapi_schema:
        document = FastAPI.openapi(app)
        _, bodies = models_json_schema(
            [(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}"
        )
        document["components"]["schemas"] |= bodies["$defs"]
        for item in document["paths"].values():
            for operation in item.values():
                _correct(operation)
    return app.openapi_schema or {}


def _correct(operation: dict[str, Any]) -> None:
    """Remove what FastAPI adds and is not so: a 422, where each error is a 4XX with an ErrorView, null for
    parameters that may be absent, and errors of a page's type, such as HTML: each is JSON.
    """
    operation["responses"].pop("422", None)
    for status in ("4XX", "5XX"):
        [content] = operation["responses"][status]["content"].values()
        operation["responses"][status]["content"] = {"application/json": content}
    for parameter in operation.get("parameters", []):
        schema = parameter["schema"]
        kinds = [kind for kind in schema.pop("anyOf", []) if kind != {"type": "null"}]
        assert len(kinds) < 2
        schema.update(*kinds)
