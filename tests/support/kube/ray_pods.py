"""What KubeRay and the kubelet make of a pod of Ray: the command ``ray start`` and its variables."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.client.processes import executables
from services.client.ray_head import RayPorts
from tests.support.kube.sandboxes import Sandbox
from tests.support.kube.schema import Json
from tests.support.kube.store import Store

OBJECT_STORE_BYTES = 100_000_000
"""What a Ray node gets that does not say it itself: this machine holds several."""
GPU = "nvidia.com/gpu"
FLAGS = ("head", "block", "no-monitor", "disable-usage-stats")
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True)
class Sources:
    """The Secrets and ConfigMaps of a namespace. A missing one raises ValueError that names it."""

    store: Store
    namespace: str

    def variables(
        self, pod: Json, cluster: Json, sandbox: Sandbox, head: tuple[str, RayPorts] | None
    ) -> dict[str, str]:
        """KubeRay's variables and the container's own."""
        spec = cluster["spec"]
        address, ports = head or (sandbox.address, sandbox.ports)
        added = {
            "RAY_CLUSTER_NAME": cluster["metadata"]["name"],
            "RAY_NODE_TYPE_NAME": labels_of(pod)["ray.io/group"],
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
        return added

    def secret(self, name: str, key: str) -> str:
        """A key of a Secret. Raises ValueError if either is missing."""
        found = self.store.find("secrets", self.namespace, name) or {}
        data = found.get("data") or {}
        if key not in data:
            raise ValueError(f'secret "{name}" with key {key} not found')
        return _decoded(data[key])

    def _all_of(self, source: Json) -> dict[str, str]:
        plural = "secrets" if "secretRef" in source else "configmaps"
        reference = source["secretRef"] if plural == "secrets" else source["configMapRef"]
        found = self.store.find(plural, self.namespace, reference["name"])
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
                "metadata.namespace": self.namespace,
                "status.podIP": sandbox.address,
            }
            return str(fields[source["fieldRef"]["fieldPath"]])
        if "secretKeyRef" in source:
            return self.secret(source["secretKeyRef"]["name"], source["secretKeyRef"]["key"])
        reference = source["configMapKeyRef"]
        found = self.store.find("configmaps", self.namespace, reference["name"])
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
    if cpus := limit_of(pod, "cpu"):
        params["num-cpus"] = str(math.ceil(cpus))
    if memory := limit_of(pod, "memory"):
        params["memory"] = str(int(memory))
    if gpus := limit_of(pod, GPU):
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
    name = labels_of(pod)["ray.io/group"]
    if name == "headgroup":
        head: Json = cluster["headGroupSpec"]
        return head
    return next(each for each in cluster["workerGroupSpecs"] if each["groupName"] == name)


def limit_of(pod: Json, resource: str) -> float:
    """The limit of the Ray container, else its request; 0 for neither."""
    resources = pod["spec"]["containers"][0].get("resources") or {}
    limits = resources.get("limits") or {}
    text = str(limits.get(resource, (resources.get("requests") or {}).get(resource, 0)))
    number = text.rstrip("KMGTikm")
    return float(number) * _UNITS[text[len(number) :]]


def labels_of(pod: Json) -> dict[str, str]:
    labels: dict[str, str] = pod["metadata"].get("labels") or {}
    return labels


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode()
