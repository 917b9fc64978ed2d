"""The error tree of the services.

    ServiceError                       has the fields of an API error body: message, param, code
    ├── BadRequest (ValueError)        the caller's mistake; 400
    │   ├── TooLarge                   a body longer than the limit; 413
    │   └── TooSlow                    a body that does not arrive in time; 408
    ├── NotFound (LookupError)         an id or name that does not exist; 404
    ├── Gone                           what existed until it expired; 410
    ├── Unauthorized                   no API key or a wrong one; 401
    ├── Forbidden                      what this key or caller may not do, or no caller; 403
    ├── Conflict                       a state that forbids it; 409 (of a create: a dataset is not ready)
    │   └── Overtaken                  a newer attempt or group of workers has taken over a run
    ├── Refused                        a run that can never start as it is; another attempt fails too
    ├── TooManyRequests                more work than the queue or the key has room for; 429, worth a retry
    ├── Unavailable                    Ray or Serve does not answer; 503, worth a retry
    │   └── ShuttingDown               a replica that ends and hands the request back
    ├── DeadlineExceeded               a request that was not done in the time it had; 504
    └── Stopped                        a stage stopped on request and can be resumed

All fields are passed to ``super().__init__`` so that the errors survive pickling between Ray processes. Ray
Data keeps only the text of a traceback, so ``param`` and ``code`` are notes too, which
``services.stages.runner`` reads.
"""

from __future__ import annotations

import math
from typing import Any, Literal


class ServiceError(Exception):
    """``param`` names the invalid field, ``code`` is for programs, ``status`` is the HTTP status.

    ``retry_after_s`` is when the same request may succeed; None where the class has no default.
    """

    status = 500
    type = "server_error"
    default_code = "server_error"
    default_retry_after_s: float | None = None

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param, code, retry_after_s)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s
        if param:
            self.add_note(f"param: {param}")
        if code:
            self.add_note(f"code: {code}")

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The JSON error body of the API."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The headers of an answer with this error: Retry-After, where a retry is worth it."""
        return (
            {} if self.retry_after_s is None else {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        )


class BadRequest(ServiceError, ValueError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class TooLarge(BadRequest):
    status = 413
    default_code = "request_too_large"


class TooSlow(BadRequest):
    status = 408
    default_code = "request_timeout"


class NotFound(ServiceError, LookupError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class Gone(ServiceError):
    status = 410
    type = "invalid_request_error"
    default_code = "expired"


class Unauthorized(ServiceError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class Forbidden(ServiceError):
    status = 403
    type = "permission_error"
    default_code = "forbidden"


class Conflict(ServiceError):
    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class Overtaken(Conflict):
    """A newer attempt has taken over this work; whoever catches this must stop writing."""

    default_code = "overtaken"


class Refused(ServiceError):
    """What runs the stages refused a run for good, such as Kubernetes with 422."""

    default_code = "run_refused"


class TooManyRequests(ServiceError):
    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"
    default_retry_after_s = 1


class Unavailable(ServiceError):
    status = 503
    type = "server_error"
    default_code = "unavailable"
    default_retry_after_s = 2


class ShuttingDown(Unavailable):
    """Another replica can do the work; the control plane sends the request again by itself."""

    default_code = "shutting_down"


class DeadlineExceeded(ServiceError):
    status = 504
    default_code = "deadline_exceeded"

    def headers(self) -> dict[str, str]:
        """OpenAI's client repeats a 5xx by itself, and this request would run out of time again."""
        return {**super().headers(), "x-should-retry": "false"}


class Stopped(ServiceError):
    """Not a failure: the state after ``step`` steps is stored. ``why`` is as in specs.StageStopped."""

    default_code = "stopped"

    def __init__(self, why: Literal["pause", "signal"], step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.args = (why, step)
        self.why: Literal["pause", "signal"] = why
        self.step = step
