"""The control plane: its settings, permissions, life cycle and scaling."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

from pydantic import ValidationError

from services.settings import Settings
from tests.validate_k8s import facts
from tests.validate_k8s.overlay import Overlay, at, title
from tests.validate_k8s.references import pods_with
from tests.validate_k8s.security import quantity

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


def findings(overlay: Overlay) -> Iterator[str]:
    for check in (
        _settings,
        _accounts,
        _lifecycle,
        _disruption,
        _scaling,
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
