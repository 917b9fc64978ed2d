"""Runs Ray's pods as processes of this machine, each in a network namespace of its own where that can be had.

The container's image is this machine: its Python, with what is installed here. What the operator and the
kubelet add is added: the parameters of ``ray start`` from the container's resources, Ray's token, variables
from Secrets and ConfigMaps, ``preStop`` within the grace period, a new start of what has ended.

GPUs are faked where the machine has none: a limit of nvidia.com/gpu is a count that Ray is told
(``--num-gpus``), and the pod's annotation ``faked-gpus`` says so.
"""

from __future__ import annotations

import base64
import math
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

from services.client.processes import Child, environment, executables, kill_marked
from services.client.ray_head import RayPorts, ray_environment
from tests.support.kube.schema import Json
from tests.support.kube.store import Store, now
from tests.support.namespaces import PodNetwork

OBJECT_STORE_BYTES = 100_000_000
"""What a Ray node gets that does not say it itself: this machine holds several."""
GPU = "nvidia.com/gpu"
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
FLAGS = ("head", "block", "no-monitor", "disable-usage-stats")
STARTS_WITHIN_S = 180.0
"""The liveness probe: a head whose dashboard does not listen by then is started again."""
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


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
        pods = self._store.list("pods", self._namespace, lambda pod: "ray.io/cluster" in _labels(pod))
        for pod in sorted(pods, key=lambda pod: _labels(pod)["ray.io/node-type"] != "head"):
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
        """Whether the container was never started, has ended, or is a head that does not get ready."""
        name = pod["metadata"]["name"]
        sandbox = self._sandboxes.get(name)
        if sandbox is None or sandbox.has_ended():
            return True
        if _labels(pod)["ray.io/node-type"] != "head" or name in self._ready:
            return False
        if _listens(sandbox.address, sandbox.ports.dashboard):
            self._ready.add(name)
            return False
        return time.monotonic() - self._started[name] > STARTS_WITHIN_S

    def address(self, cluster: str) -> tuple[str, RayPorts] | None:
        """Where the head of a cluster listens, once it was started."""
        for pod in self._store.list(
            "pods", self._namespace, lambda pod: _labels(pod).get("ray.io/cluster") == cluster
        ):
            sandbox = self._sandboxes.get(pod["metadata"]["name"])
            if _labels(pod)["ray.io/node-type"] == "head" and sandbox:
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
        cluster = self._store.find("rayclusters", self._namespace, _labels(pod)["ray.io/cluster"])
        if cluster is None:
            return
        is_head = _labels(pod)["ray.io/node-type"] == "head"
        head = None if is_head else self.address(cluster["metadata"]["name"])
        if not is_head and (head is None or not _listens(head[0], head[1].gcs)):
            self._waits(name, "PodInitializing", "waiting for the head's GCS")
            return
        sandbox = self._sandboxes.get(name) or self._sandbox(name)
        self._sandboxes[name] = sandbox
        try:
            env = self._variables(pod, cluster, sandbox, head)
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
        if _limit(pod, GPU):
            patch["metadata"] = {"annotations": {"faked-gpus": str(int(_limit(pod, GPU)))}}
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

    def _variables(
        self, pod: Json, cluster: Json, sandbox: Sandbox, head: tuple[str, RayPorts] | None
    ) -> dict[str, str]:
        """The image's variables, KubeRay's and the container's. Raises ValueError for a missing source."""
        spec = cluster["spec"]
        address, ports = head or (sandbox.address, sandbox.ports)
        added = {
            "RAY_CLUSTER_NAME": cluster["metadata"]["name"],
            "RAY_NODE_TYPE_NAME": _labels(pod)["ray.io/group"],
            "RAY_ADDRESS": f"{address}:{ports.gcs}",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        }
        auth = spec.get("authOptions") or {}
        if auth.get("mode") == "token":
            secret = auth.get("secretName") or cluster["metadata"]["name"]
            added |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.secret(secret, "auth_token")}
        container = pod["spec"]["containers"][0]
        for source in container.get("envFrom") or []:
            added |= self._all_of(source)
        for each in container.get("env") or []:
            added[each["name"]] = self._value(each, pod, sandbox)
        return {**ray_environment(sandbox.ports), **self._env, **added}

    def secret(self, name: str, key: str) -> str:
        """A key of a Secret. Raises ValueError if either is missing."""
        found = self._store.find("secrets", self._namespace, name) or {}
        data = found.get("data") or {}
        if key not in data:
            raise ValueError(f'secret "{name}" with key {key} not found')
        return _decoded(data[key])

    def _all_of(self, source: Json) -> dict[str, str]:
        plural = "secrets" if "secretRef" in source else "configmaps"
        reference = source["secretRef"] if plural == "secrets" else source["configMapRef"]
        found = self._store.find(plural, self._namespace, reference["name"])
        if found is None and not reference.get("optional"):
            raise ValueError(f'{plural.removesuffix("s")} "{reference["name"]}" not found')
        data = (found or {}).get("data") or {}
        decode: Callable[[str], str] = _decoded if plural == "secrets" else str
        return {f"{source.get('prefix', '')}{key}": decode(value) for key, value in data.items()}

    def _value(self, variable: Json, pod: Json, sandbox: Sandbox) -> str:
        source = variable.get("valueFrom")
        if not source:
            return str(variable.get("value", ""))
        if "fieldRef" in source:
            fields = {
                "metadata.name": pod["metadata"]["name"],
                "metadata.namespace": self._namespace,
                "status.podIP": sandbox.address,
            }
            return str(fields[source["fieldRef"]["fieldPath"]])
        if "secretKeyRef" in source:
            return self.secret(source["secretKeyRef"]["name"], source["secretKeyRef"]["key"])
        reference = source["configMapKeyRef"]
        found = self._store.find("configmaps", self._namespace, reference["name"])
        if found is None:
            raise ValueError(f'configmap "{reference["name"]}" not found')
        return str(found["data"][reference["key"]])


def ray_start(
    pod: Json, cluster: Json, sandbox: Sandbox, head: tuple[str, RayPorts] | None, folder: Path
) -> list[str]:
    """The command that KubeRay generates for the pod's Ray container."""
    group = _group(pod, cluster)
    ports = sandbox.ports
    params = {
        "block": "true",
        "disable-usage-stats": "true",
        "dashboard-agent-listen-port": str(ports.agent),
        "metrics-export-port": str(ports.metrics),
        "node-ip-address": sandbox.address,
        "object-store-memory": str(OBJECT_STORE_BYTES),
        "temp-dir": str(folder),
    }
    if head is None:
        params |= {"head": "true", "port": str(ports.gcs), "dashboard-host": "0.0.0.0"}
        params |= {"dashboard-port": str(ports.dashboard), "ray-client-server-port": str(ports.client)}
    else:
        params["address"] = f"{head[0]}:{head[1].gcs}"
    if cpus := _limit(pod, "cpu"):
        params["num-cpus"] = str(math.ceil(cpus))
    if memory := _limit(pod, "memory"):
        params["memory"] = str(int(memory))
    if gpus := _limit(pod, GPU):
        params["num-gpus"] = str(int(gpus))
    params |= group.get("rayStartParams") or {}
    command = [str(executables() / "ray"), "start"]
    for name, value in params.items():
        if name in FLAGS:
            command += [f"--{name}"] if value == "true" else []
        else:
            command.append(f"--{name}={value}")
    return command


def _group(pod: Json, cluster: Json) -> Json:
    name = _labels(pod)["ray.io/group"]
    if name == "headgroup":
        head: Json = cluster["headGroupSpec"]
        return head
    return next(each for each in cluster["workerGroupSpecs"] if each["groupName"] == name)


def _limit(pod: Json, resource: str) -> float:
    """The limit of the Ray container, else its request; 0 for neither."""
    resources = pod["spec"]["containers"][0].get("resources") or {}
    limits = resources.get("limits") or {}
    text = str(limits.get(resource, (resources.get("requests") or {}).get(resource, 0)))
    number = text.rstrip("KMGTikm")
    return float(number) * _UNITS[text[len(number) :]]


def _labels(pod: Json) -> dict[str, str]:
    labels: dict[str, str] = pod["metadata"].get("labels") or {}
    return labels


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode()


def _listens(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=1.0):
        return True
    return False


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True
