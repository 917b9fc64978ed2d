"""Starting processes, waiting for them, and leaving none behind."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from services.client.processes import (
    MARK,
    Child,
    StartFailed,
    environment,
    free_ports,
    kill_marked,
    port_is_free,
    wait_until,
)

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
ORPHAN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
"""


def start(code: str, folder: Path, mark: str = "test") -> Child:
    return Child("helper", [sys.executable, "-c", code], folder / "helper.log", environment(mark, {}))


def printed_pid(child: Child) -> psutil.Process:
    while not child.log.read_text().strip():
        time.sleep(0.02)
    return psutil.Process(int(child.log.read_text()))


def start_orphan(folder: Path) -> psutil.Process:
    """A process marked by its folder, whose parent has ended."""
    parent = start(ORPHAN, folder, mark=str(folder))
    orphan = printed_pid(parent)
    with pytest.raises(StartFailed, match="helper ended with exit code 0"):
        wait_until(lambda: False, "the parent runs", [parent], timeout_s=20)
    return orphan


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_process_that_ends_early_is_reported_with_the_end_of_its_log(tmp_path) -> None:
    child = start("print('line one'); raise SystemExit('no storage: bucket x')", tmp_path)
    with pytest.raises(
        StartFailed, match=r"helper ended with exit code 1; the end of .*helper\.log"
    ) as caught:
        wait_until(lambda: False, "never", [child], timeout_s=240)
    assert "no storage: bucket x" in str(caught.value)


def test_waiting_has_a_deadline_and_names_the_problem(tmp_path) -> None:
    child = start("import time; print('still loading', flush=True); time.sleep(600)", tmp_path)
    while "still loading" not in child.log.read_text():
        time.sleep(0.02)
    try:
        with pytest.raises(StartFailed, match=r"the model is not loaded after 1 s[\s\S]*still loading"):
            wait_until(lambda: False, "the model is not loaded", [child], timeout_s=1, poll_s=0.05)
    finally:
        child.stop(5.0)


def test_stopping_a_process_that_ignores_sigterm_kills_it_with_its_children(tmp_path) -> None:
    child = start(STUBBORN, tmp_path)
    grandchild, process = printed_pid(child), psutil.Process(child.pid)
    assert alive(grandchild)
    child.stop(0.3)
    assert not process.is_running()
    assert not alive(grandchild)


def test_a_marked_process_that_lost_its_parent_is_ended_and_no_other(tmp_path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    orphan = start_orphan(mine)
    bystander = start_orphan(other)
    try:
        assert orphan.environ()[MARK] == str(mine)
        kill_marked(str(mine))
        assert not alive(orphan)
        assert alive(bystander)
    finally:
        kill_marked(str(other))
    assert not alive(bystander)


def test_children_do_not_see_the_settings_of_other_systems(monkeypatch) -> None:
    monkeypatch.setenv("DDE_DATABASE_URL", "postgresql://production")
    monkeypatch.setenv("RAY_ADDRESS", "production:6379")
    monkeypatch.setenv("AWS_REGION", "here")
    env = environment("m", {"DDE_PORT": "1"})
    assert (env[MARK], env["DDE_PORT"], env["AWS_REGION"]) == ("m", "1", "here")
    assert "DDE_DATABASE_URL" not in env
    assert "RAY_ADDRESS" not in env
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_free_ports_are_different_and_can_be_listened_on() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(port_is_free(port) for port in ports)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        assert not port_is_free(ports[0])
