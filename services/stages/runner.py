"""The frame around every stage: read the spec, do the work, leave a marker. The marker decides, not the exit code."""

from __future__ import annotations

import argparse
import errno
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

from dde_core.errors import ConfigError, DdeError
from services.api.requests import Strict
from services.errors import ServiceError, Stopped, Unavailable
from services.stages import layout
from services.stages.journal import Journal
from services.stages.specs import Level, StageFailure, StageSpec, StageStopped
from services.storage import files

Spec = TypeVar("Spec", bound=StageSpec)
TRANSIENT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
"""Errors of a full or unreachable disk: another attempt of the stage may succeed."""


def run_stage(
    spec_type: type[Spec], work: Callable[[Spec, Journal], Strict], argv: Sequence[str] | None = None
) -> None:
    """Run ``work`` on the spec that ``--spec URI`` names and write done.json, or failed.json and raise.

    Work that raises Stopped has stopped on request: stopped.json is written.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True, metavar="URI")
    spec = spec_type.model_validate_json(files.read_bytes(parser.parse_args(argv).spec))
    # A shell starts background processes with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    journal, began = Journal(spec.prefix), time.monotonic()
    try:
        result = work(spec, journal)
    except BaseException as error:
        cause = root_cause(error)
        if isinstance(cause, Stopped):
            marker = StageStopped(why=cause.why, step=cause.step)
            return _leave(journal, layout.stopped_uri(spec.prefix), marker, cause.message)
        failure = failure_of(error)
        _leave(journal, layout.failed_uri(spec.prefix), failure, f"failed: {failure.message}", "error")
        raise
    _leave(journal, layout.done_uri(spec.prefix), result, f"done in {time.monotonic() - began:.1f} s")


def _leave(journal: Journal, uri: str, marker: Strict, message: str, level: Level = "info") -> None:
    """Report the end of the stage, then write its marker."""
    journal.event(message, level)
    journal.flush()
    files.write_json(uri, marker.model_dump(mode="json"))


def root_cause(error: BaseException) -> BaseException:
    """The first error of this service inside Ray's wrappers, else a transient disk error, else the error itself."""
    ours = (each for each in _inside(error) if isinstance(each, (DdeError, ServiceError)))
    transient = (each for each in _inside(error) if is_transient(each))
    return next(chain(ours, transient), error)


def _inside(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, outermost first, without Ray's wrappers."""
    if not hasattr(error, "cause"):
        yield error
    causes = [getattr(error, "cause", None), getattr(error, "controller_failure", None), error.__cause__]
    for each in [*getattr(error, "worker_failures", {}).values(), *causes]:
        if isinstance(each, BaseException):
            yield from _inside(each)


def is_transient(error: BaseException) -> bool:
    """Whether the error is that of a full or unreachable disk."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def failure_of(error: BaseException) -> StageFailure:
    """The content of failed.json: the service's own errors unchanged, others by class and first line.

    A full or unreachable disk has the code of Unavailable.
    """
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return StageFailure(message="the stage was stopped", code="stopped")
    cause = root_cause(error)
    if isinstance(cause, ServiceError):
        return StageFailure(message=cause.message, code=cause.code, param=cause.param)
    name = type(cause).__name__
    code = (
        Unavailable.default_code if is_transient(cause) else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    )
    if isinstance(cause, DdeError):
        return StageFailure(
            message=str(cause), code=code, param=cause.field if isinstance(cause, ConfigError) else None
        )
    return StageFailure(
        message=f"{name}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}", code=code
    )
