"""Pods on this machine: network namespaces on a Linux bridge, each with its own address and processes.

with PodNetwork() as network:
    pod = network.add("worker")
    container = pod.start(["ray", "start", "--block", ...], log=folder / "worker.log", env=env)
    pod.cut()  # packets to and from the pod are lost without an error
    pod.heal()
    pod.kill()  # all its processes, as a node does that loses its power

Needs root. ``unavailable()`` tells why a machine cannot do it; ``network_or_skip`` skips the test then.
"""

from __future__ import annotations

import fcntl
import ipaddress
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil
import pytest

PREFIX = "ddens"
"""Names of links are ``ddens<pid><b|v><number>``, of namespaces ``ddens<pid>-<number>-<pod>``."""
SUBNETS = ipaddress.ip_network("10.213.0.0/16").subnets(new_prefix=24)
LOCK = Path(tempfile.gettempdir()) / "ddens.lock"
"""Held while a subnet is chosen, so that two processes do not choose the same one."""
GONE_S = 10.0
"""How long killed processes may take to disappear."""
_numbers = itertools.count(1)


class Container:
    """A command in a pod, with a process namespace of its own: it is process 1 there and sees no others.

    ``ray stop`` inside of it therefore ends this container's Ray only. When process 1 ends, the others do.
    """

    def __init__(self, pod: Pod, process: subprocess.Popen[bytes], log: Path) -> None:
        self.pod = pod
        self.log = log
        self._process = process

    @property
    def pid(self) -> int | None:
        """Process 1 of the container, by its number on the machine; None if it does not run."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._process.pid).children()
            return children[0].pid if children else None
        return None

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def terminate(self) -> None:
        """Send SIGTERM to process 1. As in any container, one that has no handler for it ignores it."""
        if pid := self.pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill all processes of the container and wait for their end."""
        self._process.kill()
        self._process.wait()

    def run(self, command: Sequence[str], timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as ``kubectl exec`` does, with the environment of process 1."""
        pid = self.pid
        assert pid, f"{self.pod.name} does not run{self.tail()}"
        env = psutil.Process(pid).environ()
        enter = ["nsenter", f"--target={pid}", "--net", "--pid", "--mount", "--"]
        return _run([*enter, *command], env=env, timeout_s=timeout_s)

    def tail(self, lines: int = 20) -> str:
        """The last lines of the log, to append to a message."""
        text = self.log.read_text(errors="replace").strip().splitlines()[-lines:]
        return "\n  ".join([f"; the end of {self.log}:", *text])


class Pod:
    """A network namespace with one address. It holds any number of containers, and outlives them."""

    def __init__(self, name: str, number: int, address: str, bridge: str) -> None:
        self.name = name
        self.address = address
        self.namespace = f"{PREFIX}{os.getpid()}-{number}-{name}"
        self._link = f"{PREFIX}{os.getpid()}v{number}"
        self._bridge = bridge
        self._containers: list[Container] = []

    def start(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str],
        *,
        cwd: Path | None = None,
        mounts: Mapping[str, Path] | None = None,
    ) -> Container:
        """Start a container whose output is appended to ``log``.

        ``mounts`` shows it other folders or files of this machine at paths that exist, such as a ``/tmp/ray``
        of its own.
        """
        binds = [shlex.join(["mount", "--bind", str(here), at]) for at, here in (mounts or {}).items()]
        script = " && ".join([*binds, 'exec "$@"'])
        isolate = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
        inside = [*isolate, "sh", "-c", script, "sh", *command]
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *inside],
                cwd=cwd or log.parent,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        container = Container(self, process, log)
        self._containers.append(container)
        return container

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the pod's network, outside of its containers. Raises CalledProcessError."""
        return _run(["ip", "netns", "exec", self.namespace, *command], env=env, timeout_s=timeout_s)

    def cut(self) -> None:
        """Lose all packets to and from the pod. Nobody gets an error: connections hang."""
        _run(["ip", "link", "set", self._link, "nomaster"])

    def heal(self) -> None:
        """Undo ``cut``."""
        _run(["ip", "link", "set", self._link, "master", self._bridge])

    def processes(self) -> list[psutil.Process]:
        """All processes of all containers."""
        return [psutil.Process(pid) for pid in _pids(self.namespace) if psutil.pid_exists(pid)]

    def kill(self) -> None:
        """Kill all processes and wait for their end. The pod keeps its address; start containers again."""
        _kill_all(self.namespace)
        for container in self._containers:
            container.kill()
        self._containers.clear()

    def remove(self) -> None:
        """Kill all processes, and delete the namespace and its link."""
        self.kill()
        _remove_namespace(self.namespace)
        _run(["ip", "link", "delete", self._link], check=False)

    def create(self, prefix: int, gateway: str | None) -> None:
        """Make the namespace and its link to the bridge."""
        inside = ["ip", "-n", self.namespace]
        _run(["ip", "netns", "add", self.namespace])
        peer = ["peer", "name", "eth0", "netns", self.namespace]
        _run(["ip", "link", "add", self._link, "type", "veth", *peer])
        _run(["ip", "link", "set", self._link, "master", self._bridge, "up"])
        _run([*inside, "address", "add", f"{self.address}/{prefix}", "dev", "eth0"])
        _run([*inside, "link", "set", "eth0", "up"])
        _run([*inside, "link", "set", "lo", "up"])
        if gateway:
            _run([*inside, "route", "add", "default", "via", gateway])


class PodNetwork:
    """A bridge and its pods, in a subnet that nobody on this machine uses.

    This machine is on the network, too, as ``gateway``: its processes reach the pods, and the pods reach
    servers that listen on ``gateway``.

    Enter it only where ``unavailable()`` is None. What runs that were killed have left is removed first.
    """

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self._bridge = f"{PREFIX}{os.getpid()}b{next(_numbers)}"

    def __enter__(self) -> PodNetwork:
        with LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            remove_leftovers()
            taken = _run(["ip", "-4", "route"]).stdout
            self.subnet = next(each for each in SUBNETS if f"{each} " not in taken)
            self._addresses = self.subnet.hosts()
            self.gateway = str(next(self._addresses))
            _run(["ip", "link", "add", self._bridge, "type", "bridge"])
            _run(["ip", "address", "add", f"{self.gateway}/{self.subnet.prefixlen}", "dev", self._bridge])
            _run(["ip", "link", "set", self._bridge, "up"])
        return self

    def __exit__(self, *exc: object) -> None:
        for name in list(self.pods):
            self.remove(name)
        _run(["ip", "link", "delete", self._bridge])

    def add(self, name: str, route: bool = False) -> Pod:
        """A new pod with the next address. With a ``route`` it reaches all addresses of this machine."""
        assert name not in self.pods, f"there is a pod {name} already"
        assert re.fullmatch(r"[a-z0-9-]+", name), f"a pod's name has a-z, 0-9 and -, got {name}"
        pod = Pod(name, next(_numbers), str(next(self._addresses)), self._bridge)
        self.pods[name] = pod
        pod.create(self.subnet.prefixlen, self.gateway if route else None)
        return pod

    def remove(self, name: str) -> None:
        """Kill a pod and delete it; its address is not used again."""
        self.pods.pop(name).remove()


@cache
def unavailable() -> str | None:
    """Why no network can be made here, or None."""
    for tool in ("ip", "unshare", "nsenter"):
        if not shutil.which(tool):
            return f"network namespaces need the command {tool} (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with PodNetwork() as network:
            isolate = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
            network.add("probe").run(isolate)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made: {shlex.join(error.cmd)}: {error.stderr.strip()}"
    return None


@contextmanager
def network_or_skip() -> Iterator[PodNetwork]:
    """A network for the block; skips the test with the reason where there can be none."""
    if reason := unavailable():
        pytest.skip(reason)
    with PodNetwork() as network:
        yield network


def remove_leftovers() -> None:
    """Remove the pods and bridges of processes that have ended."""
    for namespace in _namespaces():
        if _is_leftover(namespace):
            _remove_namespace(namespace)
    for path in Path("/sys/class/net").glob(f"{PREFIX}*"):
        if _is_leftover(path.name):
            _run(["ip", "link", "delete", path.name], check=False)


def _is_leftover(name: str) -> bool:
    found = re.match(rf"{PREFIX}(\d+)[-bv]", name)
    return bool(found) and not psutil.pid_exists(int(found[1]))


def _namespaces() -> list[str]:
    lines = _run(["ip", "netns", "list"]).stdout.splitlines()
    return [line.split()[0] for line in lines if line.startswith(PREFIX)]


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _run(["ip", "netns", "pids", namespace], check=False).stdout.split()]


def _kill_all(namespace: str) -> None:
    """Kill until none is left: a process may start another one meanwhile."""
    deadline = time.monotonic() + GONE_S
    while pids := _pids(namespace):
        assert time.monotonic() < deadline, f"processes {pids} of {namespace} do not end"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _remove_namespace(namespace: str) -> None:
    _kill_all(namespace)
    _run(["ip", "netns", "delete", namespace], check=False)


def _run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    given = None if env is None else dict(env)
    return subprocess.run(command, env=given, timeout=timeout_s, check=check, capture_output=True, text=True)
