"""The processes of a local system: each runs in a session of its own and writes a log file.

Each process carries a mark in its environment, which its children inherit. The mark finds processes that have
lost their parent, and no foreign ones.
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
from typing import Literal

import psutil

from services.errors import Unavailable

MARK = "DDE_LOCAL_SYSTEM"
FOREIGN_PREFIXES = ("DDE_", "RAY_ADDRESS", "RAY_AUTH_", "RAY_JOB_")
"""Variables that begin so may configure another system; children do not inherit them."""


class StartFailed(Unavailable):
    """A part of the local system did not start. The message ends with the last lines of that part's log."""

    default_code = "start_failed"


class Child:
    """One process, leader of its own session, whose output goes to a file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str],
        retry_on: str = "",
        retries: int = 0,
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._env = env
        self._retry_on = retry_on
        self._retries = retries
        self._process = self._start("wb")

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def _start(self, mode: Literal["wb", "ab"]) -> subprocess.Popen[bytes]:
        with self.log.open(mode) as output:
            return subprocess.Popen(
                self._command,
                cwd=self.log.parent,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _restart(self) -> None:
        """Run the command again, once all of the last run has ended. Its output is appended."""
        self.stop(0.0)
        self._process = self._start("ab")

    def check(self) -> None:
        """Raise StartFailed if the process has ended. If its output ends with ``retry_on``, run it again, at
        most ``retries`` times.
        """
        code = self._process.poll()
        if code is None:
            return
        if self._retries and self._retry_on in self.tail():
            self._retries -= 1
            self._restart()
        else:
            raise StartFailed(f"{self.name} ended with exit code {code}{self.tail()}")

    def tail(self, lines: int = 20) -> str:
        """The last lines of the log, to append to a message."""
        text = self.log.read_text(errors="replace").strip().splitlines()[-lines:]
        if not text:
            return f"; {self.log} is empty"
        return "\n  ".join([f"; the end of {self.log}:", *text])

    def stop(self, timeout_s: float) -> None:
        """Terminate the process, wait, kill it at the deadline; then kill its descendants and its session.

        The mark alone would not do: Ray's workers overwrite the memory from which it is read, and lose their
        parent when it ends first.
        """
        descendants = _descendants(self.pid)
        try:
            self._process.terminate()
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:  # a second Ctrl-C may interrupt the wait
            self._process.kill()
            self._process.wait()
            _kill([*descendants, *_session(self.pid)])


def wait_until(
    ready: Callable[[], bool], problem: str, children: Sequence[Child], timeout_s: float, poll_s: float = 0.2
) -> None:
    """Poll until ``ready()``. Raises StartFailed as soon as a child has ended, and at the deadline.

    The message at the deadline names the ``problem`` and ends with the log of the first child.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        for child in children:
            child.check()
        if time.monotonic() > deadline:
            raise StartFailed(f"{problem} after {timeout_s:g} s{children[0].tail()}")
        time.sleep(poll_s)


def environment(mark: str, own: Mapping[str, str]) -> dict[str, str]:
    """A child's environment: this process's without settings of other systems, the mark, and ``own``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_PREFIXES)}
    path = os.pathsep.join([str(executables()), inherited.get("PATH", os.defpath)])
    return {**inherited, "PATH": path, MARK: mark, **own}


def executables() -> Path:
    """The folder of this interpreter, where packages install their commands."""
    return Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Distinct ports on which nobody listens now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def port_is_free(port: int) -> bool:
    """Whether a server could listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def kill_marked(mark: str) -> None:
    """Kill every process that carries the mark, with its descendants; repeat for those started meanwhile."""
    for _ in range(5):
        roots = [process for process in psutil.process_iter() if _carries(process, mark)]
        if not roots:
            return
        _kill([*roots, *(child for root in roots for child in _descendants(root.pid))])


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(process.environ().get(MARK) == mark)
    except (psutil.Error, OSError):
        return False


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _session(leader: int) -> list[psutil.Process]:
    """Processes of the session that ``leader`` started, including those that have lost their parent."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _kill(processes: Sequence[psutil.Process], timeout_s: float = 5.0) -> None:
    """Kill and wait. psutil compares start times, so a pid that another process has got since is safe."""
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=timeout_s)
