"""The control plane's settings, permissions, scaling and queue, and the Serve application's arguments."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

from pydantic import ValidationError

from services.serving.admission import Limits
from services.serving.args import ServeArgs
from services.settings import Settings
from tests.validate_k8s import facts
from tests.validate_k8s.overlay import Overlay, at, cluster_of, title
from tests.validate_k8s.references import pods_with
from tests.validate_k8s.security import SPOT, quantity

NEEDED_RULES = {
    "dde-autoscaler": {
        ("", "pods"): {"get", "list", "watch", "patch"},
        ("", "pods/resize"): {"patch"},
        ("ray.io", "rayclusters"): {"get", "list", "patch"},
    },
    "dde-control": {
        ("ray.io", "rayjobs"): {"create", "get", "list", "watch", "delete"},
        ("ray.io", "rayclusters"): {"get", "list"},
        ("", "pods"): {"get", "list"},
        ("", "events"): {"get", "list"},
    },
}
"""The permissions of each Role: these, and no more."""
SUBJECTS = {"dde-autoscaler": "dde", "dde-control": "dde-control"}
ONLY_LOCAL = {"CONTROL_IMAGE", "DDE_RAYJOB_IMAGE"}
ONLY_GPU = ONLY_LOCAL | {
    "TRAIN_MAX_PODS",
    "TRAIN_MAX_SPOT_PODS",
    "TRAIN_POD_GPUS",
    "TRAIN_POD_CPUS",
    "TRAIN_POD_MEMORY",
    "SERVE_MAX_PODS",
}
INPUTS = ONLY_GPU | {
    "GATEWAY_NAME",
    "GATEWAY_NAMESPACE",
    "PROMETHEUS_RELEASE",
    "JOB_GPUS",
    "JOB_CPUS",
    "JOB_MEMORY",
    "JOB_SPOT_GPUS",
    "NAMESPACE_GPUS",
}
"""Values of settings.env that fill in manifests. Each is checked against what it fills in."""


APPLICATION = {"name", "route_prefix", "import_path", "args"}


def findings(overlay: Overlay) -> Iterator[str]:
    for check in (
        _settings,
        _accounts,
        _lifecycle,
        _disruption,
        _scaling,
        _sizes,
        _queue,
        _quota,
        _serve,
        _jobs,
    ):
        yield from check(overlay)


def _settings(overlay: Overlay) -> Iterator[str]:
    config = overlay.config
    for document in overlay.of("ConfigMap"):
        if set(document) != {"apiVersion", "kind", "metadata", "data"}:
            yield f"{title(document)}: it has {sorted(document)}"
        if document["metadata"]["name"].startswith("dde-rayjob") and list(at(document, "data")) != [
            "rayjob.yaml"
        ]:
            yield f"{title(document)}: its key is not rayjob.yaml"
    known = facts.dde_variables(Settings)
    inputs = {"local": ONLY_LOCAL, "gpu": ONLY_GPU}.get(overlay.name, INPUTS)
    if set(config) - known != inputs - known or not inputs <= set(config):
        unread = sorted(set(config) - known - inputs)
        yield f"dde-config: nothing reads {unread}, or it lacks {sorted(inputs - set(config))}"
    values = {name.removeprefix("DDE_").lower(): value for name, value in config.items() if name in known}
    try:
        settings = _parsed(tuple(sorted(values.items())))
    except ValidationError as error:
        yield f"dde-config: {error}".replace("\n", "; ")
        return
    if {"api_key", "database_url"} & set(values):
        yield "dde-config: secrets belong into Secret dde-control"
    expected = {
        "host": "0.0.0.0",
        "migrate": False,
        "use_gpu": overlay.name != "local",
        "cluster": "own" if overlay.name == "production" else "shared",
        "metrics_port": 9464,
        "port": 8080,
    }
    for name, value in expected.items():
        if getattr(settings, name) != value:
            yield f"dde-config: {name} is {getattr(settings, name)!r}, not {value!r}"
    if not settings.storage_uri.startswith("s3://") or not all(
        s.startswith("s3://") for s in settings.allowed_sources
    ):
        yield "dde-config: pods share only an object store: storage and sources must be s3:// URIs"
    if not settings.allowed_sources or settings.driver_cpus <= 0 or settings.driver_memory < 500_000_000:
        yield "dde-config: there must be allowed sources, and drivers that reserve CPUs and memory"
    for name in sorted(n for n in inputs if n.endswith(("GPUS", "CPUS", "MEMORY", "PODS"))):
        try:
            quantity(config[name])
        except (KeyError, ValueError) as error:
            yield f"dde-config: {name}: {error}"
    for name, kind in (("rayjob_queue", "LocalQueue"), ("rayjob_priority", "WorkloadPriorityClass")):
        value = getattr(settings, name)
        if (value is not None or overlay.of(kind)) and not overlay.named(kind, value or ""):
            yield f"dde-config: {name} {value!r} is no {kind}"


@cache
def _parsed(values: tuple[tuple[str, str], ...]) -> Settings:
    with mock.patch.dict(os.environ, clear=True):
        given: dict[str, Any] = {"api_key": "k", "database_url": "postgresql+psycopg://h/d", **dict(values)}
        return Settings(**given)


def _accounts(overlay: Overlay) -> Iterator[str]:
    for account in overlay.of("ServiceAccount"):
        expected = {"automountServiceAccountToken": False, "imagePullSecrets": [{"name": "dde-registry"}]}
        if {name: account[name] for name in set(account) - {"apiVersion", "kind", "metadata"}} != expected:
            yield f"{title(account)}: it mounts tokens by default, or its pull Secret is not dde-registry"
    roles = {at(role, "metadata", "name", default=""): role for role in overlay.of("Role")}
    if set(roles) != set(NEEDED_RULES):
        yield f"Roles are {sorted(roles)}, not {sorted(NEEDED_RULES)}"
    for name, role in roles.items():
        given: dict[tuple[str, str], set[str]] = {}
        for rule in role.get("rules", []):
            for group in rule.get("apiGroups", []):
                for resource in rule.get("resources", []):
                    given.setdefault((group, resource), set()).update(rule.get("verbs", []))
        if given != NEEDED_RULES.get(name):
            yield f"Role/{name}: it permits {given}, not {NEEDED_RULES.get(name)}"
    bindings = {at(b, "metadata", "name", default=""): b for b in overlay.of("RoleBinding")}
    if set(bindings) != set(SUBJECTS):
        yield f"RoleBindings are {sorted(bindings)}, not {sorted(SUBJECTS)}"
    for name, binding in bindings.items():
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
        subject = {"kind": "ServiceAccount", "name": SUBJECTS.get(name), "namespace": "dde"}
        if binding.get("roleRef") != role or name not in roles:
            yield f"RoleBinding/{name}: roleRef is not Role {name}"
        if binding.get("subjects") != [subject] or not overlay.named(
            "ServiceAccount", SUBJECTS.get(name, "")
        ):
            yield f"RoleBinding/{name}: its subject is not {subject}"


def _lifecycle(overlay: Overlay) -> Iterator[str]:
    control = overlay.named("Deployment", "dde-control") or {}
    spec = at(control, "spec")
    grace = at(spec, "template", "spec", "terminationGracePeriodSeconds", default=30)
    drain = float(overlay.config.get("DDE_DRAIN_S", "300"))
    if grace != drain + 30:
        yield f"Deployment/dde-control: terminationGracePeriodSeconds {grace} is not DDE_DRAIN_S + 30"
    if spec.get("strategy") != {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}:
        yield "Deployment/dde-control: an update takes replicas away before there are new ones"
    replicas = spec.get("replicas")
    if replicas != {"local": 1, "gpu": 2}.get(overlay.name):
        yield f"Deployment/dde-control: replicas is {replicas}"
    for owner in overlay.of("StatefulSet"):
        if at(owner, "spec", "replicas", default=0) != 1:
            yield f"{title(owner)}: it is one server; replicas must be 1"
        for claim in at(owner, "spec", "volumeClaimTemplates", default=[]):
            storage = at(claim, "spec", "resources", "requests")
            if storage not in ({"storage": "4Gi"}, {"storage": "20Gi"}):
                yield f"{title(owner)}: its claim requests {storage}"
            if at(claim, "spec", "accessModes", default=[]) != ["ReadWriteOnce"] or len(claim["spec"]) != 2:
                yield f"{title(owner)}: accessModes is not ReadWriteOnce, or it names a storage class"


def _jobs(overlay: Overlay) -> Iterator[str]:
    for job in overlay.of("Job"):
        spec = at(job, "spec")
        if at(spec, "template", "spec", "restartPolicy", default="") != "Never":
            yield f"{title(job)}: restartPolicy is not Never, so the output of a failed pod is lost"
        if not 5 <= spec.get("backoffLimit", 6) <= 30:
            yield f"{title(job)}: backoffLimit is not between 5 and 30"
        if spec.get("activeDeadlineSeconds", 3600) < 600 or spec.get("ttlSecondsAfterFinished"):
            yield f"{title(job)}: it is killed within ten minutes, or deleted before anyone has read it"
    bucket = overlay.named("Job", "dde-bucket")
    if (bucket is None) == (overlay.name == "local"):
        yield "Job/dde-bucket: it belongs into the overlay with an S3 server of its own"


def _disruption(overlay: Overlay) -> Iterator[str]:
    expected = {"dde-control": ({"dde-part": "control"}, {"maxUnavailable": 1})}
    if overlay.name == "production":
        labels = {"dde-part": "serve", "ray.io/node-type": "worker"}
        expected["dde-serve"] = (labels, {"minAvailable": 1})
    budgets = {
        at(b, "metadata", "name", default=""): at(b, "spec") for b in overlay.of("PodDisruptionBudget")
    }
    if set(budgets) != set(expected):
        yield f"PodDisruptionBudgets are {sorted(budgets)}, not {sorted(expected)}"
    for name, spec in budgets.items():
        labels, numbers = expected.get(name, ({}, {}))
        if spec != {**numbers, "selector": {"matchLabels": labels}} or not pods_with(overlay, labels):
            yield f"PodDisruptionBudget/{name}: {spec} does not protect {labels} by {numbers}"


def _scaling(overlay: Overlay) -> Iterator[str]:
    scalers = overlay.of("HorizontalPodAutoscaler")
    if bool(scalers) != (overlay.name == "production"):
        yield "HorizontalPodAutoscaler: the control plane of production scales, and no other"
    for scaler in scalers:
        spec = at(scaler, "spec")
        target = at(spec, "scaleTargetRef")
        owner = overlay.named(target.get("kind", ""), target.get("name", ""))
        if (
            not owner
            or owner["apiVersion"] != target.get("apiVersion")
            or target.get("name") != "dde-control"
        ):
            yield f"{title(scaler)}: there is no {target}"
        if "replicas" in at(owner or {}, "spec"):
            yield f"{title(scaler)}: each `kubectl apply` resets the number, as its target has replicas"
        if not 2 <= spec.get("minReplicas", 1) < spec.get("maxReplicas", 0) <= 20:
            yield f"{title(scaler)}: not 2 <= minReplicas < maxReplicas <= 20"
        metric = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}
        if spec.get("metrics") != [{"type": "Resource", "resource": metric}]:
            yield f"{title(scaler)}: it does not scale by CPU"
        if spec.get("behavior") != {"scaleDown": {"stabilizationWindowSeconds": 600}}:
            yield f"{title(scaler)}: it shrinks at once"


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


def _serve(overlay: Overlay) -> Iterator[str]:
    for config in overlay.of("ServeConfig"):
        inside = {name: value for name, value in config.items() if name != "kind"}
        if problem := _serve_problem(json.dumps(inside)):
            yield f"serveConfigV2: {problem}"
            continue
        for application in inside["applications"]:
            yield from (f"serveConfigV2: {message}" for message in _application(overlay, application))


@cache
def _serve_problem(text: str) -> str:
    """What Ray Serve's own schema refuses, and whether it listens where the control plane calls it."""
    from ray.serve.schema import ServeDeploySchema

    try:
        options = ServeDeploySchema.model_validate_json(text).http_options
    except ValidationError as error:
        return str(error).replace("\n", "; ")
    if set(json.loads(text)) != {"applications"} or (options.host, options.port) != ("0.0.0.0", 8000):
        return "it has more than applications, or another port than DDE_SERVE_URL"
    return ""


def _application(overlay: Overlay, application: dict) -> Iterator[str]:
    if (application.get("name"), application.get("route_prefix")) != ("dde", "/") or set(
        application
    ) != APPLICATION:
        yield f"the application is not dde at /: {application}"
    module, _, function = application.get("import_path", "").partition(":")
    if not facts.has_function(module, function) or function != "build_app":
        yield f"import_path {module}:{function} is not in the repository"
    arguments = application.get("args", {})
    if "storage_uri" in arguments:
        yield "args.storage_uri would be a second place for DDE_STORAGE_URI"
    try:
        args = ServeArgs.model_validate(
            {**arguments, "storage_uri": overlay.config.get("DDE_STORAGE_URI", "")}
        )
    except ValidationError as error:
        yield f"args: {error}".replace("\n", "; ")
        return
    service = overlay.named("RayService", "dde-serve") or {}
    group = at(cluster_of(service), "workerGroupSpecs", 0)
    pod = at(group, "template", "spec", "containers", 0, "resources", "limits")
    gpus = int(pod.get("nvidia.com/gpu", 0))
    if args.use_gpu != bool(gpus) or args.use_gpu != (overlay.name != "local"):
        yield f"use_gpu is {args.use_gpu}, but a pod has {gpus} GPUs"
    per_pod = int(gpus / args.gpus_per_replica) if args.use_gpu else int(quantity(pod.get("cpu", 1)))
    if args.max_replicas > per_pod * group.get("maxReplicas", 0):
        yield f"max_replicas {args.max_replicas} are more than maxReplicas pods with {per_pod} each"
    if not args.use_gpu and args.gpus_per_replica != 1:
        yield "gpus_per_replica means nothing without use_gpu"
    least = {"production": 2}.get(overlay.name, 1)
    if args.min_replicas != least or group.get("minReplicas") != least:
        yield f"min_replicas {args.min_replicas} and minReplicas {group.get('minReplicas')} are not {least}"
    if args.limits != Limits():
        yield "limits: the route's timeout and the preStop of serve are made for the defaults"
