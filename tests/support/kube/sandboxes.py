"""Where the processes of a pod run: a network namespace of its own, or the machine's network."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

from services.client.processes import Child
from services.client.ray_head import RayPorts
from tests.support.namespaces import PodNetwork

PORTS = RayPorts(
    gcs=6379,
    dashboard=8265,
    client=10001,
    agent=52365,
    autoscaler_metrics=44217,
    dashboard_metrics=44227,
    metrics=8080,
)
"""KubeRay's, for a pod that has all ports to itself."""


class Sandbox(Protocol):
    """Where a pod's processes run."""

    address: str
    ports: RayPorts

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        """Start the container, again if it has ended."""

    def has_ended(self) -> bool:
        """Whether the container has ended or was never started."""

    def stop(self, hook: Sequence[str] | None, grace_s: float) -> None:
        """Run the preStop hook, ask the container to end, and kill it after the grace period."""

    def kill(self) -> None:
        """Kill all processes, as the loss of a machine does."""

    def processes(self) -> list[psutil.Process]:
        """All processes that run in it."""

    def remove(self) -> None:
        """Kill all processes and remove what the sandbox is made of."""


class NamespaceSandbox:
    """A pod of a PodNetwork, with a ``/tmp`` folder of Ray's of its own."""

    def __init__(self, network: PodNetwork, name: str, ray_folder: Path, own_folder: Path) -> None:
        self._network = network
        self._pod = network.add(name)
        self._mounts = {str(ray_folder): own_folder}
        self._container: Any = None
        self.address = self._pod.address
        self.ports = PORTS

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self._pod.kill()
        self._container = self._pod.start(command, log, env, mounts=self._mounts)

    def has_ended(self) -> bool:
        return self._container is None or self._container.poll() is not None

    def stop(self, hook: Sequence[str] | None, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        if hook and not self.has_ended():
            with suppress(AssertionError, subprocess.SubprocessError, psutil.Error):
                self._container.run(hook, timeout_s=grace_s)
        if not self.has_ended():
            self._container.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._container.wait(max(0.1, deadline - time.monotonic()))
        self._pod.kill()

    def kill(self) -> None:
        self._pod.kill()

    def processes(self) -> list[psutil.Process]:
        return self._pod.processes()

    def remove(self) -> None:
        self._network.remove(self._pod.name)


class LoopbackSandbox:
    """Processes on 127.0.0.1 with free ports. No preStop hook: ``ray stop`` would end every Ray here."""

    address = "127.0.0.1"

    def __init__(self, name: str) -> None:
        self._name = name
        self._child: Child | None = None
        self.ports = RayPorts.free()

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.kill()
        self._child = Child(self._name, command, log, env)

    def has_ended(self) -> bool:
        return self._child is None or not psutil.pid_exists(self._child.pid) or _is_zombie(self._child.pid)

    def stop(self, hook: Sequence[str] | None, grace_s: float) -> None:
        if self._child:
            self._child.stop(grace_s)
        self._child = None

    def kill(self) -> None:
        self.stop(None, 0.0)

    def processes(self) -> list[psutil.Process]:
        if self.has_ended():
            return []
        assert self._child
        process = psutil.Process(self._child.pid)
        return [process, *process.children(recursive=True)]

    def remove(self) -> None:
        self.kill()


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True
