"""The Serve application: pictures and scores over HTTP. It finds models in storage, so a new one needs no redeployment.

No ``from __future__ import annotations`` here: Serve moves these functions, and FastAPI could not find their types by name.
"""

import asyncio
import base64
import threading
import time

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from dde_core.errors import ConfigError
from services.api.requests import ImageRequest, ScoreRequest
from services.errors import BadRequest, ServiceError

api = FastAPI(title="dde-align serving")


class ServeArgs(BaseModel):
    """``args`` of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    storage_uri: str
    max_models: int = 4
    use_gpu: bool = False


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


@serve.deployment(num_replicas=1, max_ongoing_requests=8, max_queued_requests=64)
@serve.ingress(api)
class Pictures:
    """One engine; its calls run in a thread, so that health checks are answered meanwhile."""

    def __init__(self, args: ServeArgs) -> None:
        from services.serving.engine import Engine  # torch is loaded in replicas alone

        self._engine = Engine(args.storage_uri, args.max_models, "cuda" if args.use_gpu else "cpu")

    @api.post("/v1/images/generations")
    async def generate(self, body: ImageRequest) -> dict:
        gone = threading.Event()
        try:
            pictures = await asyncio.to_thread(self._engine.generate, body, gone.is_set)
        except asyncio.CancelledError:
            gone.set()
            raise
        return {
            "created": int(time.time()),
            "data": [{"b64_json": base64.b64encode(png).decode()} for png in pictures],
        }

    @api.post("/v1/scores")
    async def score(self, body: ScoreRequest) -> dict:
        scores = await asyncio.to_thread(self._engine.score, body)
        return {
            "object": "list",
            "data": [dict(zip(scores, row, strict=True)) for row in zip(*scores.values(), strict=True)],
        }

    @api.get("/healthz")
    async def healthz(self) -> dict:
        return {"status": "ok"}


def build_app(args: dict) -> Application:
    """The application, unstarted. ``args`` come from the Serve config and are those of ``ServeArgs``."""
    parsed = ServeArgs.model_validate(args)
    resources = {"num_cpus": 1, "num_gpus": int(parsed.use_gpu)}
    return Pictures.options(ray_actor_options=resources).bind(parsed)  # type: ignore[attr-defined]
