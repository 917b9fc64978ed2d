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
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig

from dde_core.errors import ConfigError
from services.api.images import ImageRequest, ScoreRequest
from services.api.requests import DEFAULT_PROJECT, PROJECT_HEADER
from services.errors import BadRequest, ServiceError
from services.serving.admission import Limits

SHUTDOWN_MARGIN_S = 10.0
"""How much longer than its longest request a replica may take to end."""

Project = Annotated[str, Header(alias=PROJECT_HEADER)]
api = FastAPI(title="dde-align serving")
log = logging.getLogger("ray.serve")


class ServeArgs(BaseModel):
    """``args`` of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    storage_uri: str
    max_models: int = 4
    use_gpu: bool = False
    limits: Limits = Limits()
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    target_queue_s: Annotated[float, Field(gt=0)] = 10.0
    """With ``max_replicas`` above ``min_replicas``, replicas start and stop to bring their queues to this."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _check_replicas(self) -> "ServeArgs":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: must be at least min_replicas ({self.min_replicas}), got {self.max_replicas}"
            )
        return self


@api.exception_handler(ServiceError)
async def service_error(request: Request, error: ServiceError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


@api.exception_handler(Exception)
async def unexpected_error(request: Request, error: Exception) -> JSONResponse:
    """In the API's form, too: to the control plane, a 500 without it is a replica that died."""
    return JSONResponse(ServiceError(f"the request failed: {type(error).__name__}").body(), 500)


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


@serve.deployment
@serve.ingress(api)
class ImageServer:
    """One engine a replica. Its calls run in a thread, so health checks are answered meanwhile."""

    def __init__(self, args: ServeArgs) -> None:
        from services.serving.engine import Engine  # only replicas load torch

        self._engine = Engine(args.storage_uri, args.max_models, "cuda" if args.use_gpu else "cpu")

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
        found = await in_thread(self._engine.score, body, project)
        rows = zip(*found.scores.values(), strict=True)
        data = [dict(zip(found.scores, row, strict=True)) for row in rows]
        return {"object": "list", "data": data, "scorers": found.scorers}

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}


def build_app(args: dict[str, Any]) -> Application:
    """The application, not started. ``args`` come from the Serve config; ``ServeArgs`` lists them."""
    parsed = ServeArgs.model_validate(args)
    return ImageServer.options(**deployment_options(parsed)).bind(parsed)  # type: ignore[attr-defined]


def deployment_options(args: ServeArgs) -> dict[str, Any]:
    """What Serve is told about the deployment.

    Serve's own limits are wider than ``Admission``, which knows keys and work, so they are the second line.
    A replica that stops gets no new requests, and has the time of its longest one to finish what it has.
    """
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int(args.use_gpu)},
        "max_ongoing_requests": 2 * args.limits.max_requests,
        "max_queued_requests": args.limits.max_requests,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": args.limits.max_timeout_s + SHUTDOWN_MARGIN_S,
    }
    if args.max_replicas == args.min_replicas:
        return {**options, "num_replicas": args.min_replicas}
    policy = AutoscalingPolicy(
        policy_function="services.serving.autoscaling:QueueTime",
        policy_kwargs={"target_s": args.target_queue_s},
    )
    autoscaling = AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        policy=policy,
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
    )
    return {**options, "autoscaling_config": autoscaling}
