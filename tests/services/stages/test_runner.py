"""How run_stage ends: on request, by a signal of Ray, and by errors inside Ray's wrappers."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from services.errors import Stopped, Unavailable
from services.stages.journal import read_journal
from services.stages.runner import TRANSIENT, failure_of, root_cause, run_stage
from services.stages.specs import StageFailure, StageSpec, StageStopped
from services.storage import files

WAITS = """
import sys, time
from services.stages.specs import StageSpec
from services.stages.runner import run_stage

def work(spec, journal):
    print("at work", flush=True)
    time.sleep(60)

run_stage(StageSpec, work)
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The arguments of a stage whose prefix is ``tmp_path``."""
    uri = files.join(tmp_path.as_uri(), "spec.json")
    files.write_json(uri, StageSpec(job="j", attempt=1, prefix=tmp_path.as_uri()).model_dump())
    return ["--spec", uri]


def test_a_stage_that_stops_on_request_writes_its_step_and_has_not_failed(tmp_path, arguments):
    def work(spec, journal):
        raise Stopped("pause", 7)

    run_stage(StageSpec, work, arguments)
    stopped = StageStopped.model_validate_json((tmp_path / "stopped.json").read_bytes())
    assert stopped == StageStopped(why="pause", step=7)
    assert not (tmp_path / "failed.json").exists()
    assert not (tmp_path / "done.json").exists()
    messages = [entry.message for _, entries in read_journal(tmp_path.as_uri(), 0) for entry in entries]
    assert messages == ["stopped after step 7"]


def test_a_stop_keeps_why_and_where_across_processes():
    stopped = pickle.loads(pickle.dumps(Stopped("signal", 12)))
    assert (stopped.why, stopped.step, stopped.code) == ("signal", 12, "stopped")
    assert str(stopped) == "stopped after step 12"
    assert root_cause(RayTaskError("loop", "a long traceback", stopped).as_instanceof_cause()) is stopped


WRAPPERS = {
    "nothing": lambda error: error,
    "a task": lambda error: RayTaskError("write", "a long traceback", error).as_instanceof_cause(),
    "workers": lambda error: WorkerGroupError("they failed", {0: ValueError("torn down"), 1: error}),
    "the controller": lambda error: ControllerError(
        RayTaskError("write", "a long traceback", error).as_instanceof_cause()
    ),
}


@pytest.mark.parametrize("number", sorted(TRANSIENT), ids=errno.errorcode.get)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_full_or_unreachable_disk_is_unavailable_in_every_wrapper_of_ray(wrap, number):
    failure = failure_of(
        cloudpickle.loads(cloudpickle.dumps(wrap(OSError(number, os.strerror(number), "/a/file"))))
    )
    message = f"{type(OSError(number, '')).__name__}: [Errno {number}] {os.strerror(number)}: '/a/file'"
    assert failure == StageFailure(message=message, code="unavailable")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR, None])
def test_an_error_that_a_retry_would_repeat_is_not_unavailable(number):
    error = OSError("not an error of the system") if number is None else OSError(number, "refused")
    assert failure_of(error).code != "unavailable"
    wrapped = WRAPPERS["a task"](error)
    assert (root_cause(wrapped), failure_of(wrapped).code == "unavailable") == (wrapped, False)


def test_our_error_takes_precedence_over_the_disk_error_that_caused_it():
    ours = Unavailable("the store does not answer")
    ours.__cause__ = OSError(errno.EIO, "broken")
    assert root_cause(WRAPPERS["workers"](ours)) is ours
    assert root_cause(WorkerGroupError("they failed", {0: OSError(errno.ENOSPC, "full"), 1: ours})) is ours


def test_a_stage_writes_its_marker_on_sigint_even_if_it_was_started_with_sigint_ignored(tmp_path, arguments):
    ignored = subprocess.Popen(
        [sys.executable, "-c", WAITS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell does with &
    )
    with ignored:
        assert ignored.stdout.readline() == b"at work\n"
        ignored.send_signal(signal.SIGINT)
        assert ignored.wait(240) != 0
    assert json.loads((tmp_path / "failed.json").read_text())["code"] == "stopped"
