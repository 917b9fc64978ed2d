"""Calls in a process of their own: it serves several, is replaced once it died, and answers nothing late."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from dde_core.errors import DataError
from services.artifacts.apart import IDLE_S, ProcessApart
from services.errors import BadRequest, NotFound, ServiceError
from services.storage import sources


@pytest.fixture
def start() -> Iterator[Callable[..., ProcessApart]]:
    """Makes processes that end with the test."""
    started: list[ProcessApart] = []

    def make(*args: float) -> ProcessApart:
        started.append(ProcessApart(*args))
        return started[-1]

    yield make
    for each in started:
        each.stop()


def lacks_a_library() -> None:
    raise ModuleNotFoundError("No module named 'torch'")


def refuses(error: Exception) -> None:
    raise error


def late(seconds: float) -> str:
    time.sleep(seconds)
    return "late"


def test_one_process_serves_several_calls_and_their_errors(start):
    apart = start()
    first = apart.call("a call", os.getpid)
    assert first != os.getpid()
    for error in (DataError("no"), NotFound("no"), FileNotFoundError("no")):
        with pytest.raises(type(error), match="no"):
            apart.call("a call", refuses, error)
    with pytest.raises(ServiceError, match=r"a call is not possible here: .*'torch'; install 'dde-align\[co"):
        apart.call("a call", lacks_a_library)
    assert apart.call("a call", os.getpid) == first


def test_a_process_that_dies_is_an_error_and_the_next_call_has_a_new_one(start):
    apart = start()
    first = apart.call("a call", os.getpid)
    with pytest.raises(ServiceError, match="a call died with exit code 7"):
        apart.call("a call", os._exit, 7)
    second = apart.call("a call", os.getpid)
    assert second != first
    os.kill(second, signal.SIGKILL)
    with pytest.raises(ServiceError, match="a call died with exit code -9"):
        apart.call("a call", os.getpid)


def test_a_process_that_left_idle_is_replaced_without_an_error(start):
    apart = start(0.5)
    first = apart.call("a call", os.getpid)
    apart._running[0].join(30)
    assert apart._running[0].exitcode == 0
    assert apart.call("a call", os.getpid) != first


def test_a_call_that_ends_its_process_with_0_is_not_repeated_for_ever(start):
    with pytest.raises(ServiceError, match="a call died with exit code 0"):
        start().call("a call", os._exit, 0)


def test_a_call_beyond_its_time_limit_is_ended_and_its_result_is_not_that_of_the_next(start):
    apart = start()
    first = apart.call("a call", os.getpid)
    began = time.monotonic()
    with sources.time_limit(0.1), pytest.raises(BadRequest, match="cannot be read within"):
        apart.call("a call", late, 60.0)
    assert time.monotonic() - began < 30
    assert apart.call("a call", os.getpid) not in (first, "late")


CALLER = """
import os, signal
from services.artifacts.apart import call_apart
print(call_apart("a call", os.getpid), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_of_a_caller_that_was_killed_ends():
    """It holds the caller's output open, which is read to its end."""
    command = [sys.executable, "-c", CALLER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=IDLE_S - 10)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.strip().isdigit()
