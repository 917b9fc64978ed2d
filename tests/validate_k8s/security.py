"""Pod Security "restricted", and what every pod of ours states."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.validate_k8s import facts
from tests.validate_k8s.overlay import RAY_KINDS, Overlay, Pod, at

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
RESOURCES = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}
TAINTS = {"nvidia.com/gpu", "dde-capacity", "node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}
LOST_NODE = {"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}
SPOT = {"dde-capacity": "spot"}
SUFFIXES = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SUFFIXES |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGT", 1)}


def quantity(text: str | int) -> float:
    """A Kubernetes quantity. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(text))
    if not found or found[2] not in SUFFIXES:
        raise ValueError(f"{text!r} is not a quantity")
    return float(found[1]) * SUFFIXES[found[2]]


def findings(overlay: Overlay) -> Iterator[str]:
    yield from _namespace(overlay)
    for pod in overlay.pods():
        for check in (_pod, _node, _spread):
            yield from (f"{pod.title}: {message}" for message in check(pod))
        for container in pod.containers:
            where = f"{pod.title}: {container.get('name')}"
            for check in (_container, _resources):
                yield from (f"{where}: {message}" for message in check(pod, container))


def _namespace(overlay: Overlay) -> Iterator[str]:
    (namespace,) = overlay.of("Namespace") or [{}]
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    if at(namespace, "metadata", "labels") != labels:
        yield "Namespace: its labels do not enforce Pod Security restricted"


def _pod(pod: Pod) -> Iterator[str]:
    context = at(pod.spec, "securityContext")
    if set(context) - {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "seccompProfile"}:
        yield f"securityContext has fields beyond those of restricted: {sorted(context)}"
    if context.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if at(context, "seccompProfile") != {"type": "RuntimeDefault"}:
        yield "seccompProfile is not RuntimeDefault"
    image = facts.image_of(at(pod.own_containers, 0, "image", default=""))
    ids = {context.get(name) for name in ("runAsUser", "runAsGroup", "fsGroup") if name in context}
    if image and (ids != {image.user} or not {"runAsUser", "runAsGroup"} <= set(context)):
        yield f"runAsUser, runAsGroup and fsGroup are not the image's {image.user}"
    writes = bool(at(pod.owner, "spec", "volumeClaimTemplates", default=[])) and pod.kind == "StatefulSet"
    reads = any("projected" in volume or "secret" in volume for volume in at(pod.spec, "volumes", default=[]))
    if (writes or reads) and "fsGroup" not in context:
        yield "fsGroup is missing: the mounted files could not be read"
    if len(pod.own_containers) != 1:
        yield f"it has {len(pod.own_containers)} containers, not one"
    yield from (f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(name))
    for volume in at(pod.spec, "volumes", default=[]):
        sources = set(volume) - {"name"}
        if len(sources) != 1 or sources - VOLUMES:
            yield f"volume {volume.get('name')} is {sorted(sources)}, not one of the types of restricted"
        if "emptyDir" in volume and "sizeLimit" not in at(volume, "emptyDir"):
            yield f"volume {volume.get('name')} may fill the node's disk: sizeLimit is missing"
    if pod.kind not in RAY_KINDS and pod.spec.get("enableServiceLinks") is not False:
        yield "enableServiceLinks is not false: Kubernetes would add variables that begin with DDE_"
    account = at(pod.spec, "serviceAccountName", default="")
    token = pod.spec.get("automountServiceAccountToken", False)
    if token != (pod.kind == "Deployment"):
        yield f"automountServiceAccountToken is {token}: only the control plane calls the Kubernetes API so"
    if account != ("dde-control" if pod.part in ("control", "migrate") else "dde"):
        yield f"serviceAccountName is {account!r}"


def _container(pod: Pod, container: dict) -> Iterator[str]:
    context = at(container, "securityContext")
    if set(context) - {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"}:
        yield f"securityContext has fields beyond those of restricted: {sorted(context)}"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield "capabilities are not dropped"
    if (
        pod.part in ("control", "migrate", "redis", "bucket")
        and context.get("readOnlyRootFilesystem") is not True
    ):
        yield "readOnlyRootFilesystem is not true"
    if any("hostPort" in port or "hostIP" in port for port in container.get("ports", [])):
        yield "it takes a port of the node"


def _resources(pod: Pod, container: dict) -> Iterator[str]:
    requests, limits = at(container, "resources", "requests"), at(container, "resources", "limits")
    if set(requests) != set(limits) or not {"cpu", "memory"} <= set(limits):
        yield "requests and limits must name the same resources, cpu and memory among them"
    if unknown := (set(requests) | set(limits)) - RESOURCES:
        yield f"unknown resources: {sorted(unknown)}"
    for name in set(requests) & set(limits):
        try:
            fits = quantity(requests[name]) <= quantity(limits[name])
        except ValueError as error:
            yield f"{name}: {error}"
            continue
        if not fits:
            yield f"{name}: the request is above the limit"
        if pod.gpus and requests[name] != limits[name]:
            yield f"{name}: request and limit differ in a pod with GPUs"


def _node(pod: Pod) -> Iterator[str]:
    tolerations = at(pod.spec, "tolerations", default=[])
    keys = [at(toleration, "key", default="") for toleration in tolerations]
    if set(keys) - TAINTS:
        yield f"tolerations of unknown taints: {sorted(set(keys) - TAINTS)}"
    if bool(pod.gpus) != ("nvidia.com/gpu" in keys):
        yield "a pod needs both a GPU and its toleration, or neither"
    if ("dde-capacity" in keys) != (at(pod.spec, "nodeSelector") == SPOT):
        yield "a pod of spot machines needs their label and their toleration"
    for toleration in tolerations:
        expected = _toleration(at(toleration, "key", default=""))
        if {name: value for name, value in toleration.items() if name != "tolerationSeconds"} != expected:
            yield f"toleration of {toleration.get('key')} is not {expected}"
        seconds = at(toleration, "tolerationSeconds", default=300)
        if ("tolerationSeconds" in toleration) != (toleration.get("key") in LOST_NODE):
            yield f"tolerationSeconds of {toleration.get('key')} are for lost nodes alone"
        if toleration.get("key") in LOST_NODE and not 0 < seconds <= 60:
            yield f"toleration of {toleration.get('key')}: a lost node is tolerated for more than a minute"
    lasts = pod.kind in ("Deployment", "RayCluster", "RayService", "RayJob")
    if lasts and pod.part in ("control", "train", "serve", "align") and not set(keys) >= LOST_NODE:
        yield "without tolerations of its own, Kubernetes waits 300 s before it replaces a pod of a lost node"


def _toleration(key: str) -> dict:
    if key in LOST_NODE:
        return {"key": key, "operator": "Exists", "effect": "NoExecute"}
    if key == "dde-capacity":
        return {"key": key, "operator": "Equal", "value": "spot", "effect": "NoSchedule"}
    return {"key": key, "operator": "Exists", "effect": "NoSchedule"}


def _spread(pod: Pod) -> Iterator[str]:
    constraints = at(pod.spec, "topologySpreadConstraints", default=[])
    topologies = {at(constraint, "topologyKey", default="") for constraint in constraints}
    needed = {
        "control": {"kubernetes.io/hostname", "topology.kubernetes.io/zone"},
        "serve": {"kubernetes.io/hostname"},
    }.get(pod.part if pod.group != "head" else "", set())
    if topologies != needed:
        yield f"it is spread over {sorted(topologies)}, not {sorted(needed)}"
    for constraint in constraints:
        labels = at(constraint, "labelSelector", "matchLabels")
        if labels != {"dde-part": pod.part}:
            yield f"topologySpreadConstraints select {labels}, not the pod itself"
        if constraint.get("maxSkew") != 1 or constraint.get("whenUnsatisfiable") != "ScheduleAnyway":
            yield "topologySpreadConstraints must prefer an even spread and allow another"
