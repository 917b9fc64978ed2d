"""The error tree of the services.

    ServiceError                       carries what an API error body shows: message, param, code
    ├── BadRequest (ValueError)        the caller's mistake; 400
    │   └── TooLarge                   a body longer than the limit; 413
    ├── NotFound (LookupError)         an id or name that is not there; 404
    ├── Unauthorized                   no key or a wrong one; 401
    ├── Conflict                       a state that forbids the request; 409 (never on a create)
    │   └── Overtaken                  a newer attempt or group of workers goes on with a run
    ├── Unavailable                    Ray or Serve does not answer; 503, worth another try
    └── Stopped                        a stage has ended because it was asked to; it goes on from there

All state goes through ``super().__init__`` so that the errors survive pickling between Ray processes.
"""

from __future__ import annotations

from typing import Literal


class ServiceError(Exception):
    """Base: ``param`` names the field that is wrong, ``code`` is for programs, ``status`` is the HTTP status."""

    status = 500
    type = "server_error"
    default_code = "server_error"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message, self.param, self.code = message, param, code or self.default_code

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict:
        """The JSON error body of the API."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(ServiceError, ValueError):
    status, type, default_code = 400, "invalid_request_error", "invalid_value"


class TooLarge(BadRequest):
    status, default_code = 413, "request_too_large"


class NotFound(ServiceError, LookupError):
    status, type, default_code = 404, "invalid_request_error", "not_found"


class Unauthorized(ServiceError):
    status, type, default_code = 401, "authentication_error", "invalid_api_key"


class Conflict(ServiceError):
    status, type, default_code = 409, "invalid_request_error", "conflict"


class Overtaken(Conflict):
    """Somebody newer goes on with this work; whoever gets this must leave it alone."""

    default_code = "overtaken"


class Unavailable(ServiceError):
    status, type, default_code = 503, "server_error", "unavailable"


class Stopped(ServiceError):
    """No failure: the state after ``step`` steps is stored. ``why`` as in contracts.StageStopped."""

    default_code = "stopped"

    def __init__(self, why: Literal["pause", "signal"], step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.args = (why, step)
        self.why: Literal["pause", "signal"] = why
        self.step = step
