"""Creates that may be repeated: the same key and body get the same answer, and nothing is made twice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from sqlalchemy import delete
from sqlalchemy.orm import Session

from services.control.database import Database
from services.control.tables import IdempotencyKey
from services.errors import BadRequest

Prepared = TypeVar("Prepared")
KEPT_S = 24 * 3600.0


@dataclass(frozen=True)
class Once:
    """A create request as it is told from others: its key, where there is one, and a digest of path and body."""

    key: str | None
    fingerprint: str

    @classmethod
    def of(cls, key: str | None, path: str, body: BaseModel) -> Once:
        """Raises BadRequest for a key that cannot be kept."""
        if key is not None and not (0 < len(key) <= 255):
            raise BadRequest(
                f"Idempotency-Key: must have 1 to 255 characters, got {len(key)}", param="Idempotency-Key"
            )
        return cls(key, hashlib.sha256(f"{path}\n{body.model_dump_json()}".encode()).hexdigest())

    def kept(self, session: Session) -> dict[str, Any] | None:
        """What this request was answered before. Raises BadRequest where the key stands for another one."""
        row = session.get(IdempotencyKey, self.key) if self.key else None
        if row is None or row.created_at < time.time() - KEPT_S:
            return None
        if row.fingerprint != self.fingerprint:
            raise BadRequest(
                f"Idempotency-Key: was used for another request, got {self.key!r}",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return row.answer

    def keep(self, session: Session, answer: dict[str, Any]) -> None:
        """Remember the answer for a day."""
        if self.key:
            session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < time.time() - KEPT_S))
            session.add(
                IdempotencyKey(
                    key=self.key, fingerprint=self.fingerprint, answer=answer, created_at=time.time()
                )
            )


def create_once(
    database: Database,
    once: Once,
    prepare: Callable[[], Prepared],
    insert: Callable[[Session, Prepared], dict[str, Any]],
) -> dict[str, Any]:
    """``prepare`` does the slow checks outside of the transaction, ``insert`` writes and answers, alone, inside it."""
    with database.read() as session:
        if (answer := once.kept(session)) is not None:
            return answer
    prepared = prepare()
    with database.write(alone=True) as session:
        if (answer := once.kept(session)) is None:
            answer = insert(session, prepared)
            once.keep(session, answer)
        return answer
