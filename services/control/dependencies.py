"""What endpoints take in: the key, a body that is held against its contract, pages, and what the app was
built with.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ValidationError

from services.control.database import Database
from services.control.problems import from_validation
from services.errors import BadRequest, TooLarge, Unauthorized
from services.settings import Settings

Body = TypeVar("Body", bound=BaseModel)
BODY_BYTES = 1 << 20
_bearer = HTTPBearer(auto_error=False, description="The key in DDE_API_KEY.")
_METADATA = re.compile(r"metadata\[(.+)\]")


def require_key(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """Raises Unauthorized."""
    expected = request.app.state.settings.api_key.get_secret_value()
    if given is None or not hmac.compare_digest(given.credentials.encode(), expected.encode()):
        raise Unauthorized("no API key or a wrong one; send `Authorization: Bearer KEY`")


def get_database(request: Request) -> Database:
    return request.app.state.database


def get_settings(request: Request) -> Settings:
    return request.app.state.settings


Db = Annotated[Database, Depends(get_database)]
Config = Annotated[Settings, Depends(get_settings)]
Key = Annotated[str | None, Header(alias="Idempotency-Key")]
After = Annotated[str | None, Query(description="The id of the last item already seen.")]
Limit = Annotated[int, Query(ge=1, le=100)]
LongLimit = Annotated[int, Query(ge=1, le=1000)]


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The raw body. Raises TooLarge as soon as it is known to be longer."""
    declared = request.headers.get("content-length", "")
    received = bytearray()
    if not (declared.isdigit() and int(declared) > limit_bytes):
        async for chunk in request.stream():
            received += chunk
            if len(received) > limit_bytes:
                break
        else:
            return bytes(received)
    raise TooLarge(f"the request body is longer than {limit_bytes} bytes")


def parse(model: type[Body], raw: bytes) -> Body:
    """The body as its contract.

    Parsed as JSON: strict types take dataclasses from JSON only. Raises BadRequest.
    """
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False)) from error


def body(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that reads the request's body as ``model``."""

    async def read(request: Request) -> Body:
        return parse(model, await read_body(request, BODY_BYTES))

    return read


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of that body."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def metadata_filter(request: Request) -> dict[str, str]:
    """The ``metadata[key]=value`` of the query. Raises BadRequest for text that no metadata can hold."""
    found = {
        match[1]: value
        for name, value in request.query_params.items()
        if (match := _METADATA.fullmatch(name))
    }
    for key, value in found.items():
        if "\0" in key + value:
            raise BadRequest(f"metadata[{key}]: must not hold a NUL character", param="metadata")
    return found
