"""Parameters of the endpoints: API key, body, page, and the objects that the app was built with."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Header, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from services.api.requests import TIMEOUT_HEADER, Metadata, Scope
from services.control import keys
from services.control.database import Database, ProjectDatabase
from services.control.idempotency import MAX_KEY_LENGTH
from services.control.keys import Caller
from services.control.problems import from_validation, show
from services.control.stages import source_rules
from services.errors import BadRequest, TooLarge, TooSlow
from services.settings import Settings
from services.stages import layout
from services.storage import sources

Body = TypeVar("Body", bound=BaseModel)
BODY_BYTES = 1 << 20
BODY_S = 300.0
CHUNK_S = 10.0
_bearer = HTTPBearer(auto_error=False, description="DDE_API_KEY, or a key of `dde keys create`.")
_FILTER = TypeAdapter(Metadata)
FILTERS = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "schema": _FILTER.json_schema(),
            "description": "``metadata[key]=value`` selects jobs with that metadata.",
        }
    ]
}
"""The OpenAPI entry of ``metadata_filter``."""
_TEXT = {"type": "string"}
EVENT_STREAM = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {
                "event": _TEXT,
                "data": {**_TEXT, "contentMediaType": "application/json"},
                "id": _TEXT,
                "retry": {"type": "integer", "minimum": 0},
            },
        }
    }
}
"""The OpenAPI entry of an answer of server-sent events, of which ``itemSchema`` describes each."""
_METADATA = re.compile(r"metadata\[(.+)\]", re.DOTALL)


async def require_key(
    request: Request,
    needed: SecurityScopes,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> None:
    """Find out who sends the request, and hold it to the sources of that project.

    Raises Unauthorized without a valid key, Forbidden for a key that lacks a scope of the route.
    """
    if credentials is None:
        raise keys.unauthorized()
    secret = credentials.credentials
    state = request.app.state
    if keys.is_operator(secret, state.settings.api_key.get_secret_value()):
        caller = keys.operator()
    else:
        caller = await run_in_threadpool(keys.identify, state.database, secret)
    for scope in needed.scopes:
        caller.require(cast(Scope, scope))
    request.state.caller = caller
    sources.hold_request_to(source_rules(state.settings, caller.project))


READ = Security(require_key, scopes=["read"])
SUBMIT = Security(require_key, scopes=["submit"])
GENERATE = Security(require_key, scopes=["generate"])
ADMIN = Security(require_key, scopes=["admin"])
"""A route's first dependency: the scope that its caller's key must have. Without one there is no caller."""


async def needs_storage(request: Request) -> None:
    """Raises Unavailable while storage is away, so that nobody waits for it and nothing is held meanwhile."""
    request.app.state.parts.require("storage")


STORED = Depends(needs_storage)
"""A route's second dependency, if it reads or writes our own storage."""


# These only look up, so they run at once: FastAPI sends functions that are not async to another thread.


async def get_all_projects(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


async def get_caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def get_database(request: Request) -> ProjectDatabase:
    return ProjectDatabase(request.app.state.database, request.state.caller.project)


async def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def get_root(request: Request) -> str:
    return layout.project_root(request.app.state.settings.storage_uri, request.state.caller.project)


AllProjects = Annotated[Database, Depends(get_all_projects)]
CallerOf = Annotated[Caller, Depends(get_caller)]
Db = Annotated[ProjectDatabase, Depends(get_database)]
Config = Annotated[Settings, Depends(get_settings)]
Root = Annotated[str, Depends(get_root)]
"""The root of the caller's project in storage."""
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=MAX_KEY_LENGTH)]
After = Annotated[str | None, Query(description="The id of the last item already seen.")]
Limit = Annotated[int, Query(ge=1, le=100)]
LongLimit = Annotated[int, Query(ge=1, le=1000)]
TimeoutS = Annotated[float | None, Header(alias=TIMEOUT_HEADER, gt=0, le=86_400, allow_inf_nan=False)]
"""How long the caller gives a request for images or scores."""


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The raw body. Raises TooLarge as soon as it exceeds ``limit_bytes``, and TooSlow."""
    too_large = TooLarge(f"the request body is longer than {limit_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise too_large
    received = bytearray()
    try:
        async with asyncio.timeout(BODY_S), aclosing(request.stream()) as chunks:
            while chunk := await asyncio.wait_for(anext(chunks, b""), CHUNK_S):
                received += chunk
                if len(received) > limit_bytes:
                    raise too_large
    except TimeoutError as error:
        message = f"the request body did not arrive within {BODY_S:g} s, or nothing of it for {CHUNK_S:g} s"
        raise TooSlow(message) from error
    return bytes(received)


def parse(model: type[Body], raw: bytes) -> tuple[Body, bytes]:
    """A body as ``model``, and its JSON, in which whole numbers have no fraction. Raises BadRequest.

    In JSON Schema 25.0 is an integer, for pydantic it is not.
    """
    try:
        return model.model_validate_json(raw), raw
    except ValidationError as error:
        corrected = _with_whole_numbers(raw)
        try:
            return model.model_validate_json(corrected), corrected
        except ValidationError:
            raise from_validation(error.errors(include_url=False)) from error


def _with_whole_numbers(raw: bytes) -> bytes:
    try:
        return json.dumps(json.loads(raw, parse_float=_number)).encode()
    except (ValueError, RecursionError):
        return raw


def _number(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() else number


def body(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that parses the request's body as ``model``."""

    async def read(request: Request) -> Body:
        return parse(model, await read_body(request, BODY_BYTES))[0]

    return read


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry for a body of type ``model``."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def metadata_filter(request: Request) -> dict[str, str]:
    """The ``metadata[key]=value`` parameters of the query.

    Raises BadRequest for more than a job may have, for a key that is given twice, for another form, and for
    what no key or value can be.
    """
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        match = _METADATA.fullmatch(name)
        if match is None and name.startswith("metadata"):
            raise BadRequest(
                f"metadata: must have the form metadata[key]=value, got {show(name)}", "metadata"
            )
        if match and match[1] in found:
            raise BadRequest(f"{name}: is given twice, got {show(value)}", param="metadata")
        if match:
            found[match[1]] = value
    try:
        return _FILTER.validate_python(found)
    except ValidationError as error:
        raise from_validation(
            [{**each, "loc": ("metadata", *each["loc"])} for each in error.errors()]
        ) from error
