"""/v1/keys"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from services.api.answers import KeyCreated, KeyView, ListView
from services.api.requests import KeyCreate
from services.control import keys
from services.control.dependencies import ADMIN, After, AllProjects, CallerOf, Limit, body, takes

router = APIRouter(tags=["keys"], dependencies=[ADMIN])


@router.post("/v1/keys", openapi_extra=takes(KeyCreate))
def create_key(
    request: Annotated[KeyCreate, Depends(body(KeyCreate))], database: AllProjects, caller: CallerOf
) -> KeyCreated:
    """Create a key for a project. No later answer has its secret; an Idempotency-Key is not read."""
    return keys.create(database, caller, request)


@router.get("/v1/keys")
def list_keys(
    database: AllProjects, caller: CallerOf, after: After = None, limit: Limit = 20
) -> ListView[KeyView]:
    """The project's keys; those of all projects for an admin of the default project."""
    return keys.page(database, caller, after, limit)


@router.post("/v1/keys/{key_id}/revoke")
def revoke_key(key_id: str, database: AllProjects, caller: CallerOf) -> KeyView:
    """Refuse a key from now on."""
    return keys.revoke(database, caller, key_id)
