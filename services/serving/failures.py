"""Errors of a request that nobody expected."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from dde_core.errors import ConfigError
from services.errors import ServiceError

log = logging.getLogger("ray.serve")


@contextmanager
def answered_with_their_cause() -> Iterator[None]:
    """Log an error that nobody expected, and raise a ServiceError with its cause in its place."""
    try:
        yield
    except (ServiceError, ConfigError):
        raise
    except Exception as error:
        log.exception("a request failed")
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ServiceError(f"the request failed: {type(error).__name__}: {first_line}") from error
