"""The end of a driver's output in storage, and the mark of the process that runs an attempt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.errors import Unavailable
from services.stages import driver_log
from services.stages.driver_log import DriverLog
from services.stages.runner import run_stage
from services.stages.specs import StageFailure, StageSpec, Strict
from services.storage import files


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The arguments of a stage whose prefix is ``tmp_path``."""
    uri = files.join(tmp_path.as_uri(), "spec.json")
    files.write_json(uri, StageSpec(job="j", attempt=1, prefix=tmp_path.as_uri()).model_dump())
    return ["--spec", uri]


SPEAKS = """
import os, subprocess, sys, time
from services.stages.driver_log import DriverLog

with DriverLog(sys.argv[1]) as log:
    print("from Python")
    sys.stdout.flush()
    time.sleep(0.3)
    os.write(2, b"from C\\n")
    time.sleep(0.3)
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    time.sleep(0.3)
    print("not flushed")
    log.store()
    log.add("a traceback\\n")
    log.store()
print("after it")
"""


def test_what_a_process_and_its_children_write_goes_to_storage_and_on_to_where_it_went(tmp_path):
    uri = (tmp_path / "driver.log").as_uri()
    done = subprocess.run([sys.executable, "-c", SPEAKS, uri], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["from Python", "from a child", "not flushed", "after it"]
    assert done.stderr == "from C\n"
    stored = (tmp_path / "driver.log").read_text().splitlines()
    assert stored == ["from Python", "from C", "from a child", "not flushed", "a traceback"]


def test_only_the_end_of_a_long_output_is_kept_and_nothing_blocks(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(driver_log, "KEPT_BYTES", 1000)
    with DriverLog((tmp_path / "driver.log").as_uri()) as log:
        for number in range(20_000):
            os.write(1, f"line {number}\n".encode())
        log.store()
    stored = (tmp_path / "driver.log").read_text()
    assert len(stored) == 1000
    assert stored.endswith("line 19998\nline 19999\n")
    assert capfd.readouterr().out.count("\n") == 20_000


def test_an_outage_of_storage_loses_nothing_of_the_output(tmp_path, capfd):
    folder = tmp_path / "later"
    folder.write_text("a file where the folder will be")
    with DriverLog((folder / "driver.log").as_uri(), every_s=0.05):
        os.write(1, b"said during the outage\n")
        time.sleep(0.3)
        folder.unlink()
        deadline = time.monotonic() + 10
        while not (folder / "driver.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert (folder / "driver.log").read_text() == "said during the outage\n"


KILLED = """
import sys, time
from services.stages import driver_log, runner
from services.stages.specs import StageSpec

driver_log.STORED_EVERY_S = 0.1
driver_log.DriverLog.__init__.__defaults__ = (0.1,)

def work(spec, journal):
    print("the last words", flush=True)
    time.sleep(60)

runner.run_stage(StageSpec, work)
"""


def test_the_output_of_a_killed_driver_is_in_storage(tmp_path, arguments):
    with subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE) as driver:
        deadline = time.monotonic() + 60
        log = tmp_path / "driver.log"
        while not (log.exists() and "the last words" in log.read_text()):
            assert time.monotonic() < deadline
            assert driver.poll() is None
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
        assert driver.stdout.read() == b"the last words\n"
    assert not (tmp_path / "failed.json").exists()


def test_a_stage_that_fails_leaves_its_output_and_traceback_before_its_marker(tmp_path, arguments, capfd):
    def work(spec, journal):
        print("before the error", flush=True)
        assert (tmp_path / "started.json").exists()
        raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError):
        run_stage(StageSpec, work, arguments)
    stored = (tmp_path / "driver.log").read_text()
    assert "ZeroDivisionError: by zero" in stored
    assert (tmp_path / "driver.log").stat().st_mtime_ns <= (tmp_path / "failed.json").stat().st_mtime_ns


def test_an_attempt_that_was_started_before_does_not_run_again(tmp_path, arguments):
    began = []

    def work(spec, journal):
        began.append(spec)
        return Strict()

    run_stage(StageSpec, work, arguments)
    first = json.loads((tmp_path / "started.json").read_text())
    assert first["pid"] == os.getpid()
    (tmp_path / "done.json").unlink()
    with pytest.raises(Unavailable, match="attempt 1 of this stage was started before"):
        run_stage(StageSpec, work, arguments)
    assert len(began) == 1
    failure = StageFailure.model_validate_json((tmp_path / "failed.json").read_text())
    assert failure.code == "unavailable", "another attempt follows"
    assert json.loads((tmp_path / "started.json").read_text()) == first
    assert not (tmp_path / "done.json").exists()
