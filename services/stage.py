"""The frame around every stage: read the spec, do the work, leave a marker. The marker decides, not the exit code."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

from dde_core.errors import ConfigError, DdeError
from services import storage
from services.contracts import StageFailure, StageSpec, Strict
from services.errors import ServiceError
from services.observability import Journal

Spec = TypeVar("Spec", bound=StageSpec)


def run_stage(spec_type: type[Spec], work: Callable[[Spec, Journal], Strict]) -> None:
    """Run ``work`` on the spec that ``--spec URI`` names and write done.json, or failed.json and raise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True, metavar="URI")
    spec = spec_type.model_validate_json(storage.read_bytes(parser.parse_args().spec))
    journal, began = Journal(spec.prefix), time.monotonic()
    try:
        result = work(spec, journal)
    except BaseException as error:
        cause = root_cause(error)
        journal.event(f"failed: {describe(cause)}", "error")
        journal.flush()
        failure = StageFailure(message=describe(cause), code=type(cause).__name__, param=_param(cause))
        storage.write_json(storage.join(spec.prefix, "failed.json"), failure.model_dump())
        raise
    journal.event(f"done in {time.monotonic() - began:.1f} s")
    journal.flush()
    storage.write_json(storage.join(spec.prefix, "done.json"), result.model_dump(mode="json"))


def root_cause(error: BaseException) -> BaseException:
    """The error of ours inside what Ray wraps around it (workers' failures, a task's cause), else the error itself."""
    if isinstance(error, (DdeError, ServiceError)) and not hasattr(error, "cause"):
        return error
    inside = [getattr(error, "cause", None), getattr(error, "controller_failure", None), error.__cause__]
    for each in [*getattr(error, "worker_failures", {}).values(), *inside]:
        if isinstance(each, BaseException) and isinstance(found := root_cause(each), (DdeError, ServiceError)):
            return found
    return error


def describe(error: BaseException) -> str:
    """One line for people: an error of ours as it is, another with its class."""
    return str(error) if isinstance(error, (DdeError, ServiceError)) else f"{type(error).__name__}: {error}"


def _param(error: BaseException) -> str | None:
    if isinstance(error, ConfigError):
        return error.field
    return error.param if isinstance(error, ServiceError) else None
