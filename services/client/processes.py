"""Processes that a local system starts, each in a session of its own with a log file, and how all of them are ended.

Every one carries a mark in its environment, which its children inherit. So also those that have lost their parent are
found, and nothing else is.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from services.errors import Unavailable

MARK = "DDE_LOCAL_SYSTEM"
OTHERS = ("DDE_", "RAY_ADDRESS", "RAY_AUTH_", "RAY_JOB_")
"""Settings of other systems that may stand in this process's environment."""


class StartFailed(Unavailable):
    """A part of the local system did not come up; the message ends with what that part said last."""

    default_code = "start_failed"


class Child:
    """One process, leader of its own session, whose output goes to a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=log.parent,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def check(self) -> None:
        """Raises StartFailed where the process has ended."""
        if (code := self._process.poll()) is not None:
            raise StartFailed(f"{self.name} ended with exit code {code}{self.tail()}")

    def tail(self, lines: int = 20) -> str:
        """The last lines of the log, ready to follow a message."""
        text = self.log.read_text(errors="replace").strip().splitlines()[-lines:]
        return "\n  ".join([f"; the end of {self.log}:", *text]) if text else f"; {self.log} is empty"

    def stop(self, patience_s: float) -> None:
        """Ask the process to end, wait, kill it where it does not; then kill what it has left behind.

        That is what descended from it a moment ago and what is of its session: workers of Ray overwrite the memory in
        which their mark can be read, and lose their parent where it ends first.
        """
        family = _descendants(self.pid)
        try:
            self._process.terminate()
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where a second Ctrl-C ends the waiting
            self._process.kill()
            self._process.wait()
            _kill([*family, *_session(self.pid)])


def wait_until(
    ready: Callable[[], bool], what: str, children: Sequence[Child], timeout_s: float, poll_s: float = 0.2
) -> None:
    """Ask until the answer is yes. Raises StartFailed at once where a child has ended, and at the deadline.

    What is waited for at the deadline is the matter of the first child: the end of its log is shown.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        for child in children:
            child.check()
        if time.monotonic() > deadline:
            raise StartFailed(f"{what} after {timeout_s:g} s{children[0].tail()}")
        time.sleep(poll_s)


def environment(mark: str, own: Mapping[str, str]) -> dict[str, str]:
    """What a child sees: this process's environment without settings of other systems, the mark, and ``own``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    path = os.pathsep.join([str(executables()), inherited.get("PATH", os.defpath)])
    return {**inherited, "PATH": path, MARK: mark, **own}


def executables() -> Path:
    """The folder of this interpreter, where its packages have put their commands."""
    return Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Different ports on which nobody listens now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def port_is_free(port: int) -> bool:
    """Could a server listen here?"""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def end_marked(mark: str) -> None:
    """Kill every process that carries the mark, with its descendants, also those that others start meanwhile."""
    for _ in range(5):
        roots = [process for process in psutil.process_iter() if _carries(process, mark)]
        if not roots:
            return
        _kill([*roots, *(child for root in roots for child in _descendants(root.pid))])


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and process.pid != os.getpid() and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _session(leader: int) -> list[psutil.Process]:
    """Processes of the session that ``leader`` began, also those that have lost their parent."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _kill(processes: Sequence[psutil.Process], patience_s: float = 5.0) -> None:
    """psutil compares start times, so a pid that has been given to another process is safe."""
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=patience_s)
