"""Runs a stage: read the spec, work, write a marker. The marker is the outcome, not the exit code."""

from __future__ import annotations

import argparse
import errno
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dde_core.errors import ConfigError, DdeError
from services.api.requests import Strict
from services.errors import ServiceError, Stopped, Unavailable
from services.stages import layout
from services.stages.journal import Journal
from services.stages.specs import Level, StageFailure, StageSpec, StageStopped
from services.storage import files, sources

Spec = TypeVar("Spec", bound=StageSpec)
TRANSIENT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
"""Errors of a full or unreachable disk: another attempt of the stage may succeed."""


def run_stage(
    spec_type: type[Spec], work: Callable[[Spec, Journal], Strict], argv: Sequence[str] | None = None
) -> None:
    """Run ``work`` on the spec at ``--spec URI`` and write its result to done.json.

    If work raises Stopped, it stopped on request: write stopped.json. For any other error, write failed.json
    and raise it again.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True, metavar="URI")
    spec = spec_type.model_validate_json(files.read_bytes(parser.parse_args(argv).spec))
    # A shell starts background processes with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    journal = Journal(spec.prefix)
    began = time.monotonic()
    try:
        sources.hold_to(spec.sources)
        for model in spec.base_models():
            sources.check_folder(model.uri)
        result = work(spec, journal)
    except BaseException as error:
        cause = root_cause(error)
        if isinstance(cause, Stopped):
            stopped = StageStopped(why=cause.why, step=cause.step)
            _finish(journal, layout.stopped_uri(spec.prefix), stopped, cause.message)
            return
        failure = failure_of(error)
        _finish(journal, layout.failed_uri(spec.prefix), failure, f"failed: {failure.message}", "error")
        raise
    _finish(journal, layout.done_uri(spec.prefix), result, f"done in {time.monotonic() - began:.1f} s")


def _finish(journal: Journal, uri: str, marker: Strict, message: str, level: Level = "info") -> None:
    """Record the end of the stage in the journal, then write its marker."""
    journal.event(message, level)
    journal.flush()
    files.write_json(uri, marker.model_dump(mode="json"))


def root_cause(error: BaseException) -> BaseException:
    """The first DdeError or ServiceError inside Ray's wrappers, else a transient disk error, else itself."""
    for cause in _unwrapped(error):
        if isinstance(cause, (DdeError, ServiceError)):
            return cause
    for cause in _unwrapped(error):
        if is_transient(cause):
            return cause
    return error


def _unwrapped(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, outermost first, without Ray's wrappers."""
    is_ray_wrapper = hasattr(error, "cause")
    if not is_ray_wrapper:
        yield error
    worker_failures = getattr(error, "worker_failures", {}).values()
    causes = [getattr(error, "cause", None), getattr(error, "controller_failure", None), error.__cause__]
    for cause in [*worker_failures, *causes]:
        if isinstance(cause, BaseException):
            yield from _unwrapped(cause)


def is_transient(error: BaseException) -> bool:
    """Whether the error is due to a full or unreachable disk."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def failure_of(error: BaseException) -> StageFailure:
    """The content of failed.json.

    ServiceErrors keep their fields. Other errors get a code from their class name, except for a full or
    unreachable disk, which has the code of Unavailable.
    """
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return StageFailure(message="the stage was stopped", code="stopped")
    cause = root_cause(error)
    if isinstance(cause, ServiceError):
        return StageFailure(message=cause.message, code=cause.code, param=cause.param)
    if isinstance(cause, ConfigError):
        return StageFailure(message=str(cause), code=_code_of(cause), param=cause.field)
    if isinstance(cause, DdeError):
        return StageFailure(message=str(cause), code=_code_of(cause))
    lines = str(cause).strip().splitlines() or [""]
    return StageFailure(message=f"{type(cause).__name__}: {lines[0]}", code=_code_of(cause))


def _code_of(error: BaseException) -> str:
    """The class name in snake case: ``config_error`` for a ConfigError."""
    if is_transient(error):
        return Unavailable.default_code
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
