"""Creates that a client may repeat: the same key and body get the same answer, and only one resource is
created.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel
from sqlalchemy import delete
from sqlalchemy.orm import Session

from services.api.answers import Parsed, parse
from services.control.database import ProjectDatabase
from services.control.tables import IdempotencyKey
from services.errors import BadRequest

Prepared = TypeVar("Prepared")
MAX_KEY_LENGTH = 255
KEPT_S = 24 * 3600.0


@dataclass(frozen=True)
class IdempotentRequest:
    """A create request, identified by its Idempotency-Key (if it has one) and a digest of path and body."""

    key: str | None
    fingerprint: str

    @classmethod
    def of(cls, key: str | None, path: str, body: BaseModel) -> IdempotentRequest:
        """Raises BadRequest for a key that is empty or too long."""
        if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
            raise BadRequest(
                f"Idempotency-Key: must have 1 to {MAX_KEY_LENGTH} characters, got {len(key)}",
                param="Idempotency-Key",
            )
        fingerprint = hashlib.sha256(f"{path}\n{body.model_dump_json()}".encode()).hexdigest()
        return cls(key, fingerprint)

    def stored_answer(self, session: Session, project: str, view: type[Parsed]) -> Parsed | None:
        """The answer to an earlier request of the project with this key.

        Raises BadRequest if that request had another body.
        """
        row = session.get(IdempotencyKey, (project, self.key)) if self.key else None
        if row is None or row.created_at < time.time() - KEPT_S:
            return None
        if row.fingerprint != self.fingerprint:
            raise BadRequest(
                f"Idempotency-Key: was used for a different request, got {self.key!r}; send a new key",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return parse(view, row.answer)

    def store_answer(self, session: Session, project: str, answer: BaseModel) -> None:
        """Keep the answer for a day."""
        if not self.key:
            return
        now = time.time()
        session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < now - KEPT_S))
        session.add(
            IdempotencyKey(
                project=project,
                key=self.key,
                fingerprint=self.fingerprint,
                answer=answer.model_dump(mode="json"),
                created_at=now,
            )
        )


def create_once(
    database: ProjectDatabase,
    idempotent: IdempotentRequest,
    view: type[Parsed],
    prepare: Callable[[], Prepared],
    insert: Callable[[Session, Prepared], Parsed],
) -> Parsed:
    """The answer of ``insert``, or of the earlier request that this one repeats.

    ``prepare`` runs the slow checks outside the transaction; ``insert`` writes inside it, while no other
    create runs.
    """
    with database.read() as session:
        answer = idempotent.stored_answer(session, database.project, view)
    if answer is not None:
        return answer
    prepared = prepare()
    with database.write(alone=True) as session:
        answer = idempotent.stored_answer(session, database.project, view)
        if answer is None:
            answer = insert(session, prepared)
            idempotent.store_answer(session, database.project, answer)
        return answer
