"""HTTP routes of a replica that draw images; Ray Serve is not known here."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from dde_core.errors import ConfigError
from services.api.image_urls import URLS_HEADER, ImageUrls
from services.api.images import ImageRequest, StreamEvent
from services.api.requests import DEFAULT_PROJECT, PROJECT_HEADER
from services.errors import BadRequest, ServiceError
from services.serving.images import Images, as_service_error

Project = Annotated[str, Header(alias=PROJECT_HEADER)]
Events = AsyncGenerator[StreamEvent, None]
Urls = Annotated[str | None, Header(alias=URLS_HEADER)]


def image_routes(images: Images) -> APIRouter:
    """POST /v1/images/generations."""
    router = APIRouter()

    @router.post("/v1/images/generations", response_model=None)
    async def generate(body: ImageRequest, project: Project = DEFAULT_PROJECT, urls: Urls = None) -> Response:
        try:
            if body.stream:
                return await _event_stream(images.stream(body, project))
            answer = await images.answer(body, project, _parse(urls))
        except Exception as error:
            raise as_service_error(error) from error
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    return router


def _parse(header: str | None) -> ImageUrls | None:
    try:
        return None if header is None else ImageUrls.model_validate_json(header)
    except ValidationError as error:
        raise BadRequest(f"{URLS_HEADER}: is not what the control plane sends: {error}") from error


async def _event_stream(events: Events) -> StreamingResponse:
    """Server-sent events. Until there is the first one, an error is an ordinary answer, so that the control
    plane may send the request again; later it is the last event, as OpenAI's client reads it.
    """
    first = await anext(events)

    async def as_text() -> AsyncIterator[str]:
        try:
            async with aclosing(events):
                yield _text(first)
                async for event in events:
                    yield _text(event)
        except Exception as error:
            yield f"event: error\ndata: {json.dumps(as_service_error(error).body())}\n\n"

    return StreamingResponse(as_text(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def _text(event: StreamEvent) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"


def install_errors(api: FastAPI) -> None:
    """Answer expected errors in the API's form."""

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
        message = f"{field}: {first['msg']}, got {first.get('input')!r:.200}"
        return JSONResponse(BadRequest(message, param=field).body(), status_code=400)
