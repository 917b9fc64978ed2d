"""How run_stage ends: on request, by a signal of Ray, and by errors inside Ray's wrappers."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError, UserCodeException
from ray.train import ControllerError, WorkerGroupError

from dde_core.errors import ConfigError, ModelError
from services.errors import BadRequest, Conflict, Stopped, Unavailable
from services.stages.journal import read_journal
from services.stages.runner import TRANSIENT, describe, failure_of, root_cause, run_stage
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

CROSSES_RAY_DATA = """
import ray, ray.data
from services.errors import BadRequest
from services.stages.runner import failure_of

def refuse(row):
    raise BadRequest("uri 'y' is gone", param="uri", code="no_file")

class Refusing:
    def __init__(self):
        refuse(None)

    def __call__(self, batch):
        return batch

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
one_actor = ray.data.ActorPoolStrategy(size=1)
for data in (
    ray.data.range(1).map(refuse), ray.data.range(1).map_batches(Refusing, batch_size=1, compute=one_actor)
):
    try:
        list(data.iter_rows())
    except Exception as error:
        print(failure_of(error).model_dump_json(), flush=True)
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
    assert (root_cause(wrapped), failure_of(wrapped).code == "unavailable") == (error, False)


def test_our_error_takes_precedence_over_the_disk_error_that_caused_it():
    ours = Unavailable("the store does not answer")
    ours.__cause__ = OSError(errno.EIO, "broken")
    assert root_cause(WRAPPERS["workers"](ours)) is ours
    assert root_cause(WorkerGroupError("they failed", {0: OSError(errno.ENOSPC, "full"), 1: ours})) is ours


def task_error(error: BaseException) -> RayTaskError:
    """The error of a task, with its traceback, as Ray's worker makes it."""
    try:
        raise error
    except BaseException:
        text = traceback.format_exc()
    return RayTaskError("encode", text, error, proctitle="ray::encode", pid=7, ip="10.0.0.1")


def in_user_code(error: Exception) -> RayTaskError:
    """As Ray Data wraps the error of a function; its cause is lost on the way between processes."""
    try:
        try:
            raise error
        except Exception as cause:
            raise UserCodeException("UDF failed to process a data block.") from cause
    except UserCodeException as wrapper:
        wrapped = task_error(wrapper)
        wrapper.__cause__ = None
        return wrapped


RAY = {
    "a task": lambda error: task_error(error).as_instanceof_cause(),
    "a task of a class that cannot be subclassed": task_error,
    "an actor's constructor": lambda error: ActorDiedError(task_error(error)),
    "a function of Ray Data": in_user_code,
    "a function of Ray Data, as its own class": lambda error: in_user_code(error).as_instanceof_cause(),
    "workers": lambda error: WorkerGroupError("they failed", {0: task_error(error)}),
    "the controller": lambda error: ControllerError(ActorDiedError(task_error(error))),
}


@pytest.mark.parametrize("wrap", RAY.values(), ids=RAY)
def test_a_failure_inside_ray_is_its_cause_in_one_plain_line(wrap):
    error = wrap(ValueError("shape is [3, 4],\n    expected [3, 5]\nin layer 7"))
    assert describe(error) == "ValueError: shape is [3, 4],"
    assert failure_of(error) == StageFailure(message="ValueError: shape is [3, 4],", code="value_error")


@pytest.mark.parametrize("wrap", RAY.values(), ids=RAY)
def test_a_failure_inside_ray_keeps_the_code_of_its_cause(wrap):
    assert failure_of(wrap(ModelError("no tokenizer"))) == StageFailure(
        message="no tokenizer", code="model_error"
    )
    gone = BadRequest("uri 'y' is gone")
    assert failure_of(wrap(gone)) == StageFailure(message="uri 'y' is gone", code="invalid_value")
    assert failure_of(wrap(Unavailable("the store does not answer"))).code == "unavailable"
    assert failure_of(wrap(OSError(errno.ENOSPC, "No space left on device"))).code == "unavailable"
    assert failure_of(wrap(OSError(errno.EACCES, "Permission denied"))).code == "permission_error"
    assert failure_of(wrap(KeyError())).message == "KeyError: "


@pytest.mark.parametrize("wrap", RAY.values(), ids=RAY)
def test_a_failure_inside_ray_keeps_the_field_and_the_code_of_its_cause(wrap):
    gone = BadRequest("uri 'y' is gone:\nno file", param="uri", code="no_file")
    failure = failure_of(wrap(gone))
    assert (failure.param, failure.code) == ("uri", "no_file")
    assert failure.message.startswith("uri 'y' is gone:")
    expected = StageFailure(message="beta must be positive, got -1", code="config_error", param="beta")
    assert failure_of(wrap(ConfigError("beta", -1, "must be positive"))) == expected
    assert failure_of(wrap(Conflict("taken", param="name"))) == StageFailure(
        message="taken", code="conflict", param="name"
    )


def test_notes_survive_pickling_once():
    error = pickle.loads(pickle.dumps(BadRequest("no", param="uri", code="no_file")))
    assert error.__notes__ == ["param: uri", "code: no_file"]


@pytest.mark.slow
def test_the_field_of_an_error_crosses_ray_data(tmp_path):
    """On Ray itself: an error of a function, and one of an actor's constructor."""
    script = tmp_path / "cross.py"
    script.write_text(CROSSES_RAY_DATA)
    output = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert output.returncode == 0, output.stderr
    failure = {"message": "uri 'y' is gone", "code": "no_file", "param": "uri"}
    lines = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    assert lines == [failure, failure], output.stdout


def test_of_errors_that_raise_others_the_last_one_is_shown():
    def chained() -> ValueError:
        error = ValueError("the outer one")
        error.__cause__ = KeyError("the inner one")
        return error

    assert {describe(wrap(chained())) for wrap in (RAY["a task"], RAY["an actor's constructor"])} == {
        "ValueError: the outer one"
    }


def test_a_dead_actor_is_described_by_ray_without_ids():
    error = RayActorError(error_msg="The actor died.\n\tclass_name: Encoder\n\tpid: 7\nIts node has died.")
    assert describe(error) == "RayActorError: The actor died. Its node has died."
    assert failure_of(error).code == "ray_actor_error"


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
