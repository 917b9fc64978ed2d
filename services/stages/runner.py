"""Runs a stage: read the spec, work, write a marker. The marker is the outcome, not the exit code."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import signal
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dde_core.errors import ConfigError, DdeError
from services.api.requests import Strict
from services.errors import Overtaken, ServiceError, Stopped, Unavailable
from services.stages import layout
from services.stages.driver_log import DriverLog, without_color
from services.stages.journal import Journal
from services.stages.specs import Level, StageFailure, StageSpec, StageStopped
from services.storage import files, sources

Spec = TypeVar("Spec", bound=StageSpec)
TRANSIENT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
"""Errors of a full or unreachable disk: another attempt of the stage may succeed."""
MAX_MESSAGE_CHARS = 1000
_ERROR_IN_TRACEBACK = re.compile(
    r"^(?:  File |.*\(pid=)[^\n]*\n(?: [^\n]*\n)*(?P<name>[\w.]+)(?:: ?(?P<message>[^\n]*))?$", re.MULTILINE
)
"""What follows the frames of a traceback: an error's class and the first line of its message."""
_NOTE = re.compile(r"^(param|code): (\S+)$", re.MULTILINE)
"""A note of our errors, which follows their message."""
_ERRNO = re.compile(r"\[Errno (\d+)\]")


def run_stage(
    spec_type: type[Spec], work: Callable[[Spec, Journal], Strict], argv: Sequence[str] | None = None
) -> None:
    """Run ``work`` on the spec at ``--spec URI`` and write its result to done.json.

    If work raises Stopped, it stopped on request: write stopped.json. For any other error, write failed.json
    and raise it again. An attempt runs once: where another process has started it, it ends as unavailable.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True, metavar="URI")
    spec = spec_type.model_validate_json(files.read_bytes(parser.parse_args(argv).spec))
    # A shell starts background processes with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with DriverLog(layout.driver_log_uri(spec.prefix)) as log:
        _run(spec, work, Journal(spec.prefix), log)


def _run(spec: Spec, work: Callable[[Spec, Journal], Strict], journal: Journal, log: DriverLog) -> None:
    began = time.monotonic()
    try:
        _claim(spec)
        sources.hold_to(spec.sources)
        for model in spec.base_models():
            sources.check_folder(model.uri)
        for uri in spec.scorer_files():
            sources.check_files(uri)
        result = work(spec, journal)
    except BaseException as error:
        cause = root_cause(error)
        if isinstance(cause, Stopped):
            stopped = StageStopped(why=cause.why, step=cause.step)
            log.store()
            _finish(journal, layout.stopped_uri(spec.prefix), stopped, cause.message)
            return
        failure = failure_of(error)
        log.add(traceback.format_exc())
        log.store()
        _finish(journal, layout.failed_uri(spec.prefix), failure, f"failed: {failure.message}", "error")
        raise
    log.store()
    _finish(journal, layout.done_uri(spec.prefix), result, f"done in {time.monotonic() - began:.1f} s")


def _claim(spec: StageSpec) -> None:
    """Become the process that runs this attempt. Raises Unavailable if there was another one.

    KubeRay submits a job again under the same id when the head has lost it, such as after a restart: that
    must not run beside, or after, what the first process has done.
    """
    process = {"at": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
    uri = layout.started_uri(spec.prefix)
    if not files.create_bytes(uri, json.dumps(process).encode()):
        first = files.read_bytes(uri).decode(errors="replace")
        message = f"attempt {spec.attempt} of this stage was started before, as {uri} says: {first}"
        raise Unavailable(f"{message}; only a new attempt can go on")


def _finish(journal: Journal, uri: str, marker: Strict, message: str, level: Level = "info") -> None:
    """Record the end of the stage in the journal, then write its marker."""
    journal.event(message, level)
    journal.flush()
    files.write_json(uri, marker.model_dump(mode="json"))


def root_cause(error: BaseException) -> BaseException:
    """The first DdeError or ServiceError inside Ray's wrappers, else a transient disk error, else the first
    error that is not Ray's, else itself."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, (DdeError, ServiceError)):
            return cause
    for cause in causes:
        if is_transient(cause):
            return cause
    return next((cause for cause in causes if not _is_of_ray(cause)), error)


def describe(error: BaseException) -> str:
    """The class and the first line of the message of an error's root cause, without Ray's wrappers."""
    name, message = _class_and_message(root_cause(error))
    return f"{_without_package(name)}: {message}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, outermost first. Ray's wrappers of another error are left out."""
    if not (_is_of_ray(error) and hasattr(error, "cause")):
        yield error
    worker_failures = getattr(error, "worker_failures", {}).values()
    causes = [getattr(error, "cause", None), getattr(error, "controller_failure", None), error.__cause__]
    for cause in [*worker_failures, *causes]:
        if isinstance(cause, BaseException):
            yield from _causes(cause)


def _is_of_ray(error: BaseException) -> bool:
    return any(each.__module__.partition(".")[0] == "ray" for each in type(error).__mro__)


def _class_and_message(error: BaseException) -> tuple[str, str]:
    """The name of an error's class and the first line of its message.

    Of some errors Ray keeps the traceback's text alone: those of an actor's constructor and of Ray Data's
    functions.
    """
    text = _text(error)
    if not _is_of_ray(error):
        return type(error).__name__, text.partition("\n")[0]
    match = _error_in(text)
    if match:
        return match["name"], match["message"] or ""
    lines = [line for line in text.splitlines() if not line.startswith("\t")]  # without ids of processes
    return type(error).__name__, " ".join(lines)[:MAX_MESSAGE_CHARS]


def _text(error: BaseException) -> str:
    return without_color(str(error)).strip()


def _error_in(text: str) -> re.Match[str] | None:
    """The last error in the text of tracebacks that is not Ray's."""
    errors = reversed(list(_ERROR_IN_TRACEBACK.finditer(text)))
    return next((match for match in errors if not match["name"].startswith("ray.")), None)


def _notes_in(text: str) -> dict[str, str]:
    """``param`` and ``code`` of the error that ``_error_in`` finds, as far as its notes name them."""
    match = _error_in(text)
    return dict(_NOTE.findall(text[match.end() :].partition("\n\n")[0])) if match else {}


def _without_package(name: str) -> str:
    return name.rpartition(".")[2]


def is_transient(error: BaseException) -> bool:
    """Whether the error is due to a full or unreachable disk."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def recurs(error: BaseException) -> bool:
    """Whether another try would end in the same error: it is ours, and no outage or overtaking attempt is."""
    cause = root_cause(error)
    return isinstance(cause, (DdeError, ServiceError)) and not isinstance(cause, (Unavailable, Overtaken))


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
    if isinstance(cause, DdeError):
        param = cause.field if isinstance(cause, ConfigError) else None
        return StageFailure(message=str(cause), code=_in_snake_case(type(cause).__name__), param=param)
    name, message = _class_and_message(cause)
    number = _ERRNO.match(message)
    if is_transient(cause) or (number and int(number[1]) in TRANSIENT):
        return StageFailure(message=f"{name}: {message}", code=Unavailable.default_code)
    if name in _CODES:
        notes = _notes_in(_text(cause))
        code = notes.get("code", _CODES[name])
        return StageFailure(message=message, code=code, param=notes.get("param"))
    name = _without_package(name)
    return StageFailure(message=f"{name}: {message}", code=_in_snake_case(name))


def _in_snake_case(name: str) -> str:
    """``config_error`` for ConfigError."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _subclasses(error: type[Exception]) -> Iterator[type[Exception]]:
    for each in error.__subclasses__():
        yield each
        yield from _subclasses(each)


_CODES = {
    f"{each.__module__}.{each.__name__}": getattr(each, "default_code", _in_snake_case(each.__name__))
    for root in (DdeError, ServiceError)
    for each in _subclasses(root)
}
"""Codes of our errors, by what a traceback calls them."""
