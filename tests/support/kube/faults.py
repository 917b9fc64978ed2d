"""Faults that the stand-in API server injects into chosen requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from tests.support.kube.objects import ApiError
from tests.support.s3_server import Choice, always

_REASONS = {
    401: ("Unauthorized", "Unauthorized"),
    403: ("Forbidden", "forbidden: denied by the test"),
    409: ("Conflict", "the object has been modified; please apply your changes to the latest version"),
    429: ("TooManyRequests", "Too many requests, please try again later."),
    500: ("InternalError", "Internal error occurred: etcdserver: leader changed"),
    503: ("ServiceUnavailable", "the server is currently unable to handle the request"),
    504: ("Timeout", "Timeout: request did not complete within the allotted timeout"),
}


@dataclass
class Fault:
    """Hits the ``chosen`` requests of ``method`` (empty: any) whose path and query contain ``target``.

    With ``code`` the request is not carried out and answered so; 429 with ``retry_after_s``. Without: the
    request is carried out unless ``carried_out`` is False, and the connection closes without an answer. A
    watch closes after ``seconds``.
    """

    code: int | None = None
    chosen: Choice = always
    method: str = ""
    target: str = ""
    carried_out: bool = True
    retry_after_s: int = 1
    seconds: float = 0.0
    seen: Iterator[int] = field(default_factory=count, init=False)

    def hits(self, method: str, target: str) -> bool:
        matches = self.method in ("", method) and self.target in target
        return matches and self.chosen(next(self.seen))

    def error(self) -> ApiError | None:
        """The answer; None where the connection closes without one."""
        if self.code is None:
            return None
        reason, message = _REASONS[self.code]
        details = {"retryAfterSeconds": self.retry_after_s} if self.code == 429 else {}
        return ApiError(self.code, reason, message, **details)
