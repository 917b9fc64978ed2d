"""Runs Ray's pods as processes of this machine, each in a network namespace of its own where that can be had.

The container's image is this machine: its Python, with what is installed here. What the operator and the
kubelet add is added: the parameters of ``ray start`` from the container's resources, Ray's token, variables
from Secrets and ConfigMaps, ``preStop`` within the grace period, a new start of what has ended.

GPUs are faked where the machine has none: a limit of nvidia.com/gpu is a count that Ray is told
(``--num-gpus``), and the pod's annotation ``faked-gpus`` says so.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from services.client.processes import environment, kill_marked
from services.client.ray_head import RayPorts, ray_environment
from tests.support.kube.objects import now
from tests.support.kube.ray_pods import GPU, Sources, labels_of, limit_of, ray_start
from tests.support.kube.sandboxes import LoopbackSandbox, NamespaceSandbox, Sandbox
from tests.support.kube.schema import Json
from tests.support.kube.store import Store
from tests.support.namespaces import PodNetwork

STARTS_WITHIN_S = 240.0
"""The liveness probe: a node whose dashboard (head) or agent (worker) does not listen by then is started
again.
"""


class Kubelet:
    """Starts, watches and ends the pods of ``store``. ``tend`` is one look at all of them.

    ``network`` None: pods share the machine's network. ``env`` are the image's variables.
    """

    def __init__(
        self,
        store: Store,
        namespace: str,
        folder: Path,
        network: PodNetwork | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.sources = Sources(store, namespace)
        self._store = store
        self._namespace = namespace
        self.folder = folder
        self._network = network
        self._env = env or {}
        self._mark = str(folder)
        # Short: Ray's Unix sockets lie below it.
        self._ray_folder = Path(tempfile.mkdtemp(prefix="ddek-", dir="/tmp"))
        self._sandboxes: dict[str, Sandbox] = {}
        self._ending: dict[str, threading.Thread] = {}
        self._numbers: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._ready: set[str] = set()

    def close(self) -> None:
        """Kill all processes and remove all sandboxes and folders."""
        for thread in list(self._ending.values()):
            thread.join(60.0)
        for name in list(self._sandboxes):
            self._sandboxes.pop(name).remove()
        kill_marked(self._mark)
        shutil.rmtree(self._ray_folder, ignore_errors=True)

    def tend(self) -> None:
        """Start new pods, start ended containers again, and end what is being deleted."""
        pods = self._store.list("pods", self._namespace, lambda pod: "ray.io/cluster" in labels_of(pod))
        for pod in sorted(pods, key=lambda pod: labels_of(pod)["ray.io/node-type"] != "head"):
            meta = pod["metadata"]
            if "deletionTimestamp" in meta:
                self._end(pod)
            elif (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded"):
                self._drop(meta["name"])
            elif self._needs_start(pod):
                self._start(pod)
        for name in set(self._sandboxes) - {pod["metadata"]["name"] for pod in pods} - set(self._ending):
            self._drop(name)

    def _needs_start(self, pod: Json) -> bool:
        """Whether the container was never started, has ended, or does not get ready."""
        name = pod["metadata"]["name"]
        sandbox = self._sandboxes.get(name)
        if sandbox is None or sandbox.has_ended():
            return True
        if name in self._ready:
            return False
        is_head = labels_of(pod)["ray.io/node-type"] == "head"
        if _listens(sandbox.address, sandbox.ports.dashboard if is_head else sandbox.ports.agent):
            self._ready.add(name)
            return False
        return time.monotonic() - self._started[name] > STARTS_WITHIN_S

    def address(self, cluster: str) -> tuple[str, RayPorts] | None:
        """Where the head of a cluster listens, once it was started."""
        for pod in self._store.list(
            "pods", self._namespace, lambda pod: labels_of(pod).get("ray.io/cluster") == cluster
        ):
            sandbox = self._sandboxes.get(pod["metadata"]["name"])
            if labels_of(pod)["ray.io/node-type"] == "head" and sandbox:
                return sandbox.address, sandbox.ports
        return None

    def kill(self, pod: str) -> None:
        """Kill all processes of a pod. It is started again, as after a loss of power."""
        self._sandboxes[pod].kill()

    def processes(self) -> list[psutil.Process]:
        """All processes of all pods."""
        return [process for sandbox in list(self._sandboxes.values()) for process in sandbox.processes()]

    def tail(self, pod: str, lines: int = 20) -> str:
        """The last lines of what the pod's container has written, to append to a message."""
        log = self._log(pod)
        text = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
        return "\n  ".join([f"; the end of {log}:", *text])

    def _log(self, pod: str) -> Path:
        return self.folder / f"{pod}.log"

    def _start(self, pod: Json) -> None:
        meta = pod["metadata"]
        name = meta["name"]
        cluster = self._store.find("rayclusters", self._namespace, labels_of(pod)["ray.io/cluster"])
        if cluster is None:
            return
        is_head = labels_of(pod)["ray.io/node-type"] == "head"
        head = None if is_head else self.address(cluster["metadata"]["name"])
        if not is_head and (head is None or not _listens(head[0], head[1].dashboard)):
            self._waits(name, "PodInitializing", "waiting for the head")
            return
        sandbox = self._sandboxes.get(name) or self._sandbox(name)
        self._sandboxes[name] = sandbox
        try:
            env = {**ray_environment(sandbox.ports), **self._env}
            env |= self.sources.variables(pod, cluster, sandbox, head)
            command = ray_start(pod, cluster["spec"], sandbox, head, self._ray_folder)
        except ValueError as error:
            self._waits(name, "CreateContainerConfigError", str(error))
            return
        sandbox.start(command, self._log(name), environment(self._mark, env))
        self._started[name] = time.monotonic()
        self._ready.discard(name)
        restarts = self._numbers.get(name, -1) + 1
        self._numbers[name] = restarts
        container = {"name": pod["spec"]["containers"][0]["name"], "ready": True, "restartCount": restarts}
        container |= {
            "image": pod["spec"]["containers"][0]["image"],
            "imageID": "",
            "state": {"running": {"startedAt": now()}},
        }
        status = {"phase": "Running", "podIP": sandbox.address, "containerStatuses": [container]}
        patch: Json = {"spec": {"nodeName": "this-machine"}}
        if limit_of(pod, GPU):
            patch["metadata"] = {"annotations": {"faked-gpus": str(int(limit_of(pod, GPU)))}}
        self._store.patch("pods", self._namespace, name, patch)
        self._store.patch("pods", self._namespace, name, {"status": status}, part="status")

    def _sandbox(self, name: str) -> Sandbox:
        if self._network is None:
            return LoopbackSandbox(name)
        own = Path(tempfile.mkdtemp(prefix="pod-", dir=self._ray_folder))
        return NamespaceSandbox(self._network, name, self._ray_folder, own)

    def _end(self, pod: Json) -> None:
        """Stop the container in the background, then let the pod go."""
        name = pod["metadata"]["name"]
        if name in self._ending:
            return
        grace_s = pod["metadata"].get("deletionGracePeriodSeconds", 0)
        hook = (
            pod["spec"]["containers"][0]
            .get("lifecycle", {})
            .get("preStop", {})
            .get("exec", {})
            .get("command")
        )

        def end() -> None:
            sandbox = self._sandboxes.get(name)
            if sandbox:
                sandbox.stop(hook, grace_s)
            self._drop(name)
            if self._store.find("pods", self._namespace, name):
                self._store.delete("pods", self._namespace, name, {"gracePeriodSeconds": 0})
            self._ending.pop(name, None)

        self._ending[name] = threading.Thread(target=end, daemon=True)
        self._ending[name].start()

    def _drop(self, name: str) -> None:
        sandbox = self._sandboxes.pop(name, None)
        if sandbox:
            sandbox.remove()

    def _waits(self, name: str, reason: str, message: str) -> None:
        state = {"waiting": {"reason": reason, "message": message}}
        status = {"phase": "Pending", "containerStatuses": [{"name": "ray", "ready": False, "state": state}]}
        self._store.patch("pods", self._namespace, name, {"status": status}, part="status")


def _listens(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=1.0):
        return True
    return False
