"""Errors as bodies of the API: ``{"error": {"message", "type", "param", "code"}}``.

Invalid input is a 400.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from dde_core.errors import ConfigError
from services.errors import BadRequest, ServiceError, Unavailable

log = logging.getLogger("dde")
MAX_SHOWN = 200
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unexpected_keyword_argument": "unknown_parameter",
    "json_invalid": "invalid_json",
}
_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}
_PLACES = {"query", "path", "header", "body"}


def from_validation(errors: Sequence[Any]) -> BadRequest:
    """The first of pydantic's errors as a BadRequest that names field and value."""
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    message = first["msg"]
    value = first.get("input")
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, ConfigError):
        path.append(cause.field)
        message = cause.reason
        value = cause.value
    code = _CODES.get(first["type"], "invalid_value")
    if code == "invalid_json":
        return BadRequest(
            f"the request body is not JSON: {message.removeprefix('Invalid JSON: ')}", code=code
        )
    param = ".".join(path) or None
    got = "" if first["type"] == "missing" else f", got {show(value)}"
    where = param or "the request body"
    return BadRequest(f"{where}: {message}{got}", param=param, code=code)


def show(value: Any) -> str:
    """A value as JSON, shortened, for an error message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def install(app: FastAPI) -> None:
    """Register the handlers of expected errors. The middleware answers all others."""
    app.add_exception_handler(ServiceError, _service_error)
    for away in (OperationalError, InterfaceError, PoolTimeoutError):
        app.add_exception_handler(away, _database_away)
    app.add_exception_handler(RequestValidationError, _parameters)
    app.add_exception_handler(HTTPException, _http_error)


def _service_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    headers = error.headers()
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error.body(), error.status, headers)


def _database_away(request: Request, error: Exception) -> JSONResponse:
    """The database does not answer, or all connections to it are in use."""
    log.error("the database is away: %s", " ".join(str(error).split())[:500])
    return _service_error(request, Unavailable("the database does not answer; try again later"))


def _parameters(request: Request, error: Exception) -> JSONResponse:
    """Errors of query and path parameters; "query" or "path" is dropped from the field's name."""
    assert isinstance(error, RequestValidationError)
    found = [
        {**each, "loc": [part for part in each["loc"] if part not in _PLACES]} for each in error.errors()
    ]
    return _service_error(request, from_validation(found))


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "http_error")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed_methods(request))
    message = f"{error.detail}: {request.method} {request.url.path}"
    content = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return JSONResponse(content, error.status_code, headers)


def _allowed_methods(request: Request) -> list[str]:
    """Every method of the URL: it may have a route for each.

    A path such as /v1/datasets/validate is no id, although a route of ids matches it.
    """
    documented = request.app.openapi()["paths"].get(request.url.path)
    if documented is not None:
        return sorted(method.upper() for method in documented)

    def is_route(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes)

    return [method for method in METHODS if is_route(method)]
