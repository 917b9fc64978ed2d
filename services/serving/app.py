"""The Serve application: images and scores over HTTP.

Names of models are looked up in storage, so a new model needs no redeployment.

No ``from __future__ import annotations`` here: Serve moves these functions, so FastAPI could not resolve
the names of their types.
"""

import asyncio
import base64
import logging
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel as Fields
from pydantic import ConfigDict, Field
from ray import serve
from ray.serve import Application

from dde_core.errors import ConfigError
from services.api.images import ImageRequest, ScoreRequest
from services.api.requests import DEFAULT_PROJECT, PROJECT_HEADER
from services.errors import BadRequest, ServiceError
from services.serving.images import as_service_error
from services.serving.loaded import LoadedModels
from services.serving.memory import Memory, memory_of
from services.serving.scoring import Scoring

Project = Annotated[str, Header(alias=PROJECT_HEADER)]
api = FastAPI(title="dde-align serving")
log = logging.getLogger("ray.serve")


class ServeArgs(Fields):
    """``args`` of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    storage_uri: str
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    preload: list[str] = []
    use_gpu: bool = False

    @property
    def device(self) -> str:
        """The device of models and scorers."""
        return "cuda" if self.use_gpu else "cpu"

    @property
    def memory_bytes(self) -> int:
        """Memory for models and scorers: ``max_bytes``, or half of what there is."""
        return self.max_bytes or memory_of(self.device) // 2


@api.exception_handler(ServiceError)
async def service_error(request: Request, error: ServiceError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status)


@api.exception_handler(ConfigError)
async def config_error(request: Request, error: ConfigError) -> JSONResponse:
    return JSONResponse(BadRequest(str(error), param=error.field).body(), status_code=400)


@api.exception_handler(RequestValidationError)
async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    message = f"{field}: {first['msg']}, got {first.get('input')!r}"
    return JSONResponse(BadRequest(message, param=field).body(), status_code=400)


async def in_thread(work: Callable[..., Any], *args: Any) -> Any:
    """Call ``work`` in a thread. An error that nobody expected is logged, and answered with its cause."""
    try:
        return await asyncio.to_thread(work, *args)
    except (ServiceError, ConfigError):
        raise
    except Exception as error:
        log.exception("a request failed")
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ServiceError(f"the request failed: {type(error).__name__}: {first_line}") from error


@serve.deployment(num_replicas=1, max_ongoing_requests=8, max_queued_requests=64)
@serve.ingress(api)
class ImageServer:
    """One engine a replica. Its calls run in a thread, so health checks are answered meanwhile."""

    async def __init__(self, args: ServeArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        from dde_core.engine.model import BaseModel  # only replicas load torch
        from dde_core.models.folder import ModelFolder
        from services.serving.engine import Engine

        memory = Memory(args.memory_bytes)
        self._engine = Engine(args.storage_uri, device=args.device)
        self._models = LoadedModels(
            args.storage_uri, memory, lambda folder: BaseModel(ModelFolder(folder), args.device)
        )
        self._scoring = Scoring(args.storage_uri, memory, args.device)
        await self._models.preload(args.preload)

    @api.post("/v1/images/generations")
    async def generate(self, body: ImageRequest, project: Project = DEFAULT_PROJECT) -> dict[str, Any]:
        disconnected = threading.Event()
        try:
            images = await in_thread(self._engine.generate, body, disconnected.is_set, project)
        except asyncio.CancelledError:
            disconnected.set()
            raise
        return {
            "created": int(time.time()),
            "data": [{"b64_json": base64.b64encode(png).decode()} for png in images],
        }

    @api.post("/v1/scores")
    async def score(self, body: ScoreRequest, project: Project = DEFAULT_PROJECT) -> dict[str, Any]:
        try:
            found = await self._scoring.score(body, project)
        except Exception as error:
            raise as_service_error(error) from error
        return found.answer()

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}


def build_app(args: dict[str, Any]) -> Application:
    """The application, not started. ``args`` come from the Serve config; ``ServeArgs`` lists them."""
    parsed = ServeArgs.model_validate(args)
    resources = {"num_cpus": 1, "num_gpus": int(parsed.use_gpu)}
    return ImageServer.options(ray_actor_options=resources).bind(parsed)  # type: ignore[attr-defined]
