"""Sizes, the queue and quotas: settings.env reaches the documents, and the parts fit in together."""

from __future__ import annotations

from collections.abc import Iterator

from tests.validate_k8s.control import INPUTS
from tests.validate_k8s.overlay import Overlay, at, cluster_of, title
from tests.validate_k8s.security import SPOT, quantity


def findings(overlay: Overlay) -> Iterator[str]:
    for check in (_sizes, _queue, _quota):
        yield from check(overlay)


def _sizes(overlay: Overlay) -> Iterator[str]:
    """Sizes of settings.env reach the groups that they are for."""
    config = overlay.config
    if overlay.name == "local":
        return
    for document in overlay.of("RayCluster", "RayService"):
        for group in at(cluster_of(document), "workerGroupSpecs", default=[]):
            name = group.get("groupName", "")
            size = at(group, "template", "spec", "containers", 0, "resources", "limits")
            most = {
                "gpu": "TRAIN_MAX_PODS",
                "gpu-spot": "TRAIN_MAX_SPOT_PODS",
                "serve": "SERVE_MAX_PODS",
            }.get(name)
            if most and str(group.get("maxReplicas")) != config.get(most):
                yield f"{title(document)}/{name}: maxReplicas is not {most}"
            if name in ("gpu", "gpu-spot"):
                given = {
                    resource: str(size.get(resource)) for resource in ("nvidia.com/gpu", "cpu", "memory")
                }
                wanted = [config.get(f"TRAIN_POD_{what}") for what in ("GPUS", "CPUS", "MEMORY")]
                if list(given.values()) != wanted:
                    yield f"{title(document)}/{name}: {given} is not TRAIN_POD_*"
    groups = {
        g.get("groupName")
        for g in at(
            cluster_of(overlay.named("RayCluster", "dde-train") or {}), "workerGroupSpecs", default=[]
        )
    }
    if groups != {"cpu", "gpu", "gpu-spot"}:
        yield f"RayCluster/dde-train: its groups are {sorted(map(str, groups))}"


def _queue(overlay: Overlay) -> Iterator[str]:
    queues = overlay.of("ClusterQueue")
    if len(queues) != (overlay.name == "production"):
        yield "ClusterQueue: production has one, no other overlay has"
    flavors = {
        at(flavor, "metadata", "name", default=""): at(flavor, "spec")
        for flavor in overlay.of("ResourceFlavor")
    }
    toleration = {"key": "dde-capacity", "operator": "Equal", "value": "spot", "effect": "NoSchedule"}
    expected = {"dde-on-demand": {}, "dde-spot": {"nodeLabels": SPOT, "tolerations": [toleration]}}
    if queues and flavors != expected:
        yield f"ResourceFlavors are {flavors}, not {expected}"
    for local in overlay.of("LocalQueue"):
        if not overlay.named("ClusterQueue", at(local, "spec", "clusterQueue", default="")):
            yield f"{title(local)}: there is no ClusterQueue {at(local, 'spec', 'clusterQueue')}"
    for queue in queues:
        spec = at(queue, "spec")
        selector = {"matchLabels": {"kubernetes.io/metadata.name": "dde"}}
        if spec.get("namespaceSelector") != selector or spec.get("queueingStrategy") != "StrictFIFO":
            yield f"{title(queue)}: it does not admit namespace dde alone, in order"
        for group in at(spec, "resourceGroups", default=[]):
            yield from _quotas(overlay, title(queue), group)
    for priority in overlay.of("WorkloadPriorityClass"):
        if not 0 < priority.get("value", 0) <= 10_000 or not priority.get("description"):
            yield f"{title(priority)}: it has no value between 1 and 10000, or no description"


def _quotas(overlay: Overlay, where: str, group: dict) -> Iterator[str]:
    covered = at(group, "coveredResources", default=[])
    requested = {
        resource
        for pod in overlay.pods()
        if pod.kind == "RayJob"
        for container in pod.containers
        for resource in at(container, "resources", "requests")
    }
    if set(covered) != requested:
        yield f"{where}: it covers {sorted(covered)}, but RayJobs request {sorted(requested)}"
    names = [flavor.get("name") for flavor in group.get("flavors", [])]
    if names != ["dde-on-demand", "dde-spot"] or not all(
        overlay.named("ResourceFlavor", str(n)) for n in names
    ):
        yield f"{where}: its flavors are {names}"
    config = overlay.config
    for flavor in group.get("flavors", []):
        given = {r.get("name"): str(r.get("nominalQuota")) for r in flavor.get("resources", [])}
        gpus = "JOB_SPOT_GPUS" if flavor.get("name") == "dde-spot" else "JOB_GPUS"
        wanted = {
            "cpu": config.get("JOB_CPUS"),
            "memory": config.get("JOB_MEMORY"),
            "ephemeral-storage": "100Ti",
            "nvidia.com/gpu": config.get(gpus),
        }
        if given != wanted or list(given) != covered:
            yield f"{where}: flavor {flavor.get('name')} has {given}, not {wanted} as coveredResources"


def _quota(overlay: Overlay) -> Iterator[str]:
    quotas = overlay.of("ResourceQuota")
    if len(quotas) != (overlay.name == "production"):
        yield "ResourceQuota: production has one, no other overlay has"
    config = overlay.config
    for quota in quotas:
        hard = at(quota, "spec", "hard")
        if set(hard) != {"requests.nvidia.com/gpu", "count/rayjobs.ray.io", "pods"} or set(quota["spec"]) != {
            "hard"
        }:
            yield f"{title(quota)}: it limits {sorted(hard)}"
            continue
        if hard["requests.nvidia.com/gpu"] != config.get("NAMESPACE_GPUS"):
            yield f"{title(quota)}: requests.nvidia.com/gpu is not NAMESPACE_GPUS"
        if not all(100 <= quantity(hard[name]) <= 10_000 for name in ("count/rayjobs.ray.io", "pods")):
            yield f"{title(quota)}: RayJobs or pods are not between 100 and 10000"
        numbers = {
            name: int(quantity(config.get(name, "0"))) for name in INPUTS if name.endswith(("GPUS", "PODS"))
        }
        shared = (numbers["TRAIN_MAX_PODS"] + numbers["TRAIN_MAX_SPOT_PODS"]) * numbers["TRAIN_POD_GPUS"]
        needed = numbers["JOB_GPUS"] + numbers["JOB_SPOT_GPUS"] + shared + 2 * numbers["SERVE_MAX_PODS"]
        if numbers["NAMESPACE_GPUS"] < needed:
            yield f"{title(quota)}: NAMESPACE_GPUS {numbers['NAMESPACE_GPUS']} are fewer than {needed}"
