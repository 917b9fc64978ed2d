"""API keys: created, listed, revoked, and recognized. Only their SHA-256 is stored.

A key is 256 random bits, so a plain hash is enough. DDE_API_KEY is no row: it belongs to the default project
and may do everything. An admin key of the default project manages the keys of all projects, one of another
project its own project's alone.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.api.answers import KeyCreated, KeyView, ListView
from services.api.requests import ALL_SCOPES, DEFAULT_PROJECT, KeyCreate, Scope
from services.control.database import Database
from services.control.listing import by_id, list_view, newest
from services.control.tables import ApiKey, new_id
from services.control.views import key_view
from services.errors import Forbidden, Unauthorized

HINT_CHARACTERS = 4


@dataclass(frozen=True)
class Caller:
    """Who sends a request: the project of its key, what the key may do, and its id (None: DDE_API_KEY)."""

    project: str
    scopes: tuple[Scope, ...]
    key: str | None = None

    @property
    def managed_project(self) -> str | None:
        """The project whose keys an admin manages; None: all of them."""
        return None if self.project == DEFAULT_PROJECT else self.project

    def require(self, scope: Scope) -> None:
        """Raises Forbidden unless the key has the scope."""
        if scope not in self.scopes:
            has = ", ".join(self.scopes)
            message = f"this request needs a key with the scope {scope!r}; this key has {has}"
            raise Forbidden(message, code="missing_scope")


def operator() -> Caller:
    """Whoever has DDE_API_KEY."""
    return Caller(DEFAULT_PROJECT, ALL_SCOPES)


def is_operator(secret: str, api_key: str) -> bool:
    """Whether ``secret`` is DDE_API_KEY, in a time that does not depend on the answer."""
    return hmac.compare_digest(_digest(secret), _digest(api_key))


def identify(database: Database, secret: str) -> Caller:
    """Who has this key. Raises Unauthorized for a key that does not exist or was revoked."""
    with database.read() as session:
        row = session.scalar(select(ApiKey).where(ApiKey.digest == _digest(secret)))
    if row is None or row.revoked_at is not None:
        raise unauthorized()
    return Caller(row.project, tuple(scope for scope in ALL_SCOPES if scope in row.scopes), row.id)


def check_not_revoked(session: Session, caller: Caller) -> None:
    """Raises Unauthorized if the caller's key was revoked after it was recognized, for answers that last."""
    if caller.key is not None:
        is_valid = (ApiKey.id == caller.key) & ApiKey.revoked_at.is_(None)
        if session.scalar(select(ApiKey.id).where(is_valid)) is None:
            raise unauthorized()


def unauthorized() -> Unauthorized:
    """The same for no key, a wrong one and a revoked one."""
    return Unauthorized("missing or wrong API key; send `Authorization: Bearer KEY`")


def create(database: Database, caller: Caller, request: KeyCreate) -> KeyCreated:
    """A new key, whose secret is in this answer alone. Raises Forbidden for another project's key."""
    project = request.project or caller.project
    if caller.managed_project not in (None, project):
        message = f"project: a key of project {caller.project!r} manages no other, got {project!r}"
        raise Forbidden(message, param="project", code="other_project")
    secret = f"dde_{secrets.token_urlsafe(32)}"
    row = ApiKey(
        id=new_id("key"),
        created_at=time.time(),
        name=request.name,
        scopes=[scope for scope in ALL_SCOPES if scope in request.scopes],
        digest=_digest(secret),
        hint=secret[-HINT_CHARACTERS:],
    )
    with database.write(project) as session:
        session.add(row)
    return KeyCreated(**key_view(row).model_dump(), key=secret)


def page(database: Database, caller: Caller, after: str | None, limit: int) -> ListView[KeyView]:
    """The keys that the caller manages, newest first, revoked ones too."""
    with database.read(caller.managed_project) as session:
        rows = newest(session, ApiKey, select(ApiKey), after, limit)
        return list_view([key_view(row) for row in rows], limit)


def revoke(database: Database, caller: Caller, key_id: str) -> KeyView:
    """Refuse a key from now on. Raises NotFound for a key that the caller does not manage."""
    with database.write(caller.managed_project) as session:
        row = by_id(session, ApiKey, key_id)
        row.revoked_at = row.revoked_at or time.time()
        return key_view(row)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
