"""Every name that stands for something else is resolved: in the overlay, the code or the script."""

from __future__ import annotations

import re
from collections.abc import Iterator

from services.control.launchers import rayjob
from tests.validate_k8s import facts
from tests.validate_k8s.overlay import Overlay, Pod, at, title

NEEDED_LABELS = {"dde-part", "release", "dde-capacity", "app.kubernetes.io/name"}
OF_RUNS = {
    *(rayjob.MANAGED_BY, rayjob.INSTALLATION, rayjob.JOB, rayjob.STAGE, rayjob.ATTEMPT, rayjob.PROJECT),
    *(rayjob.RUN, rayjob.PREFIX, rayjob.DIGEST),
}
"""Labels and annotations of a run's RayJob and pods: the control plane writes and reads them."""
PROVIDED_CONFIG = {"kube-root-ca.crt": ["ca.crt"]}
"""ConfigMaps that Kubernetes puts into every namespace."""


LABELED = {
    ("Deployment", "dde-control"): "control",
    ("Service", "dde-control"): "control",
}
_PARTS = "control train align serve redis"
DOCUMENTS = {
    "Namespace/dde",
    "ConfigMap/dde-config",
    "ConfigMap/dde-rayjob",
    "Deployment/dde-control",
    "Job/dde-migrate",
    "PodDisruptionBudget/dde-control",
    "RayCluster/dde-train",
    "RayService/dde-serve",
    "StatefulSet/dde-redis",
    *(f"Service/dde-{name}" for name in ("control", "redis")),
    *(f"ServiceAccount/{name}" for name in ("dde", "dde-control")),
    *(f"{kind}/dde-{name}" for kind in ("Role", "RoleBinding") for name in ("autoscaler", "control")),
    *(f"NetworkPolicy/dde-{part}" for part in _PARTS.split()),
}
MORE_DOCUMENTS = {
    "local": {
        "Job/dde-bucket",
        *(
            f"{kind}/dde-{part}"
            for kind in ("Service", "StatefulSet", "NetworkPolicy")
            for part in ("postgres", "s3")
        ),
    },
    "production": {
        "ClusterQueue/dde",
        "HTTPRoute/dde-control",
        "HorizontalPodAutoscaler/dde-control",
        "PodDisruptionBudget/dde-serve",
        "PodMonitor/dde-ray",
        "PrometheusRule/dde",
        "ResourceFlavor/dde-on-demand",
        "ResourceFlavor/dde-spot",
        "ResourceQuota/dde",
        "ServiceMonitor/dde-control",
    },
}


def findings(overlay: Overlay) -> Iterator[str]:
    yield from _documents(overlay)
    for pod in overlay.pods():
        yield from (f"{pod.title}: {message}" for message in _pod(overlay, pod))


def config_maps(overlay: Overlay) -> dict[str, list[str]]:
    found = {d["metadata"]["name"]: sorted(at(d, "data")) for d in overlay.of("ConfigMap")}
    return {**PROVIDED_CONFIG, **found}


def pods_with(overlay: Overlay, labels: dict) -> list[Pod]:
    """The pods that a selector of labels selects; an empty selector selects none here."""
    return [pod for pod in overlay.pods() if labels and labels.items() <= pod.labels.items()]


def _documents(overlay: Overlay) -> Iterator[str]:
    titles = [title(d) for d in overlay.documents if d["kind"] != "ServeConfig"]
    yield from (f"{name}: exists twice" for name in {t for t in titles if titles.count(t) > 1})
    cluster_wide = ("Namespace", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass", "ServeConfig")
    names = [at(d, "metadata", "name") for d in overlay.of("Namespace")]
    for document in overlay.documents:
        namespace = at(document, "metadata", "namespace", default=None)
        if document["kind"] in cluster_wide:
            if namespace:
                yield f"{title(document)}: it has no namespace"
        elif [namespace] != names:
            yield f"{title(document)}: its namespace {namespace!r} is not that of Namespace {names}"
        labels = {**at(document, "metadata", "labels")}
        if document["kind"] == "Namespace":
            labels = {}
        if set(labels) - NEEDED_LABELS - (OF_RUNS if document["kind"] == "RayJob" else set()):
            yield f"{title(document)}: nothing reads its labels {sorted(labels)}"
        if set(at(document, "metadata")) - {"name", "namespace", "labels", "annotations"}:
            yield f"{title(document)}: metadata has {sorted(document['metadata'])}"
        annotations = {*at(document, "metadata", "annotations")}
        if annotations - (OF_RUNS if document["kind"] == "RayJob" else set()):
            yield f"{title(document)}: nothing reads its annotations"
    hashed = {re.sub(r"^(ConfigMap/dde-\w+)-\w+$", r"\1", t) for t in titles}
    expected = DOCUMENTS | MORE_DOCUMENTS.get(overlay.name, set())
    chosen = {"LocalQueue", "WorkloadPriorityClass", "RayJob"}  # settings.env and the control plane name them
    if {t for t in hashed if t.split("/")[0] not in chosen} != expected:
        yield f"the documents are not those that the runbook names: {sorted(hashed ^ expected)}"
    for (kind, name), part in LABELED.items():
        if at(overlay.named(kind, name), "metadata", "labels", "dde-part", default="") != part:
            yield f"{kind}/{name}: apply.sh and monitors select it by dde-part={part}"


def _pod(overlay: Overlay, pod: Pod) -> Iterator[str]:
    account = at(pod.spec, "serviceAccountName", default="")
    if not overlay.named("ServiceAccount", account):
        yield f"there is no ServiceAccount {account!r}"
    if set(pod.labels) - {"dde-part", "ray.io/node-type"} - (OF_RUNS if pod.kind == "RayJob" else set()):
        yield f"nothing selects its labels {sorted(pod.labels)}"
    kept = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    wanted = kept if (pod.kind, pod.group) == ("RayCluster", "head") else {}
    if at(pod.template, "metadata", "annotations") != wanted:
        yield f"its annotations are not {wanted}"
    selector = {"matchLabels": at(pod.template, "metadata", "labels")}
    if pod.kind in ("Deployment", "StatefulSet") and at(pod.owner, "spec", "selector") != selector:
        yield "spec.selector is not the labels of its pods"
    claims = {
        at(c, "metadata", "name", default="")
        for c in at(pod.owner, "spec", "volumeClaimTemplates", default=[])
    }
    names = [at(volume, "name", default="") for volume in at(pod.spec, "volumes", default=[])]
    mounted = {m.get("name") for c in pod.containers for m in at(c, "volumeMounts", default=[])}
    if mounted != set(names) | claims or len(set(names)) < len(names):
        there = sorted(set(names) | claims)
        yield f"volumes {there} are not those that are mounted: {sorted(map(str, mounted))}"
    for volume in at(pod.spec, "volumes", default=[]):
        yield from _volume(overlay, volume)
    for container in pod.containers:
        for port in at(container, "ports", default=[]):
            if not port.get("name") or port.get("protocol", "TCP") != "TCP":
                yield f"port {port} has no name, or is not TCP"


def _volume(overlay: Overlay, volume: dict) -> Iterator[str]:
    where = f"volume {volume.get('name')}"
    sources = [*at(volume, "projected", "sources", default=[]), volume]
    for source in sources:
        if "configMap" in source:
            named = at(source, "configMap")
            yield from _keys(where, "ConfigMap", named.get("name", ""), named, config_maps(overlay))
        if "secret" in source:
            named = at(source, "secret")
            keys = facts.secret_keys(overlay.name)
            yield from _keys(where, "Secret", named.get("secretName", ""), named, keys)
            if named.get("optional") or named.get("defaultMode") != 0o440:
                yield f"{where}: it is optional, or others may read it"


def _keys(where: str, kind: str, name: str, source: dict, known: dict[str, list[str]]) -> Iterator[str]:
    if name not in known:
        yield f"{where}: there is no {kind} {name!r}"
        return
    items = source.get("items", [])
    if not items or not {at(item, "key", default="") for item in items} <= set(known[name]):
        yield f"{where}: {kind} {name} has not the keys of items: {items}"
    if any(item.get("path") != item.get("key") for item in items):
        yield f"{where}: a file is not called as its key"
