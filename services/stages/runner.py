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
from services.stages.journal import Journal
from services.stages.specs import Level, StageFailure, StageSpec, StageStopped
from services.storage import files

Spec = TypeVar("Spec", bound=StageSpec)
TRANSIENT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
"""What the operating system says of a disk that is full or away: it may be well again when the stage is tried again."""


def run_stage(
    spec_type: type[Spec], work: Callable[[Spec, Journal], Strict], argv: Sequence[str] | None = None
) -> None:
    """Run ``work`` on the spec that ``--spec URI`` names and write done.json, or failed.json and raise.

    Work that raises Stopped has ended as it was asked to: stopped.json is written.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True, metavar="URI")
    spec = spec_type.model_validate_json(files.read_bytes(parser.parse_args(argv).spec))
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored by all that a shell has started in the background
    journal, began = Journal(spec.prefix), time.monotonic()
    try:
        result = work(spec, journal)
    except BaseException as error:
        cause = root_cause(error)
        if isinstance(cause, Stopped):
            return _leave(
                journal, spec, "stopped.json", StageStopped(why=cause.why, step=cause.step), cause.message
            )
        failure = failure_of(error)
        _leave(journal, spec, "failed.json", failure, f"failed: {failure.message}", "error")
        raise
    _leave(journal, spec, "done.json", result, f"done in {time.monotonic() - began:.1f} s")


def _leave(
    journal: Journal, spec: StageSpec, name: str, marker: Strict, message: str, level: Level = "info"
) -> None:
    """The stage's last act: what it says, then its marker."""
    journal.event(message, level)
    journal.flush()
    files.write_json(files.join(spec.prefix, name), marker.model_dump(mode="json"))


def root_cause(error: BaseException) -> BaseException:
    """The error of ours inside what Ray wraps around it (workers' failures, a task's cause), else the disk's that may pass,
    else the error itself."""
    ours = (each for each in _inside(error) if isinstance(each, (DdeError, ServiceError)))
    passing = (each for each in _inside(error) if is_transient(each))
    return next(chain(ours, passing), error)


def _inside(error: BaseException) -> Iterator[BaseException]:
    """The error and what brought it about, outermost first, without Ray's wrappers, which pass for what they hold."""
    if not hasattr(error, "cause"):
        yield error
    causes = [getattr(error, "cause", None), getattr(error, "controller_failure", None), error.__cause__]
    for each in [*getattr(error, "worker_failures", {}).values(), *causes]:
        if isinstance(each, BaseException):
            yield from _inside(each)


def is_transient(error: BaseException) -> bool:
    """Whether it is about a disk that is full or away."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def failure_of(error: BaseException) -> StageFailure:
    """What failed.json says: an error of ours as it is, another by its class and first line; a full or absent disk is
    unavailable."""
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
