"""The RayJob of a run: the operator's template, checked when the app starts, and what each run fills in."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import yaml

from services.control.launchers.contract import Needs, Run
from services.control.launchers.kubernetes_api import Object
from services.errors import BadRequest, Refused

MANAGER = "dde-control"
MANAGED_BY = "app.kubernetes.io/managed-by"
INSTALLATION = "dde-installation"
JOB = "dde-job"
STAGE = "dde-stage"
ATTEMPT = "dde-attempt"
PROJECT = "dde-project"
RUN = "dde-run"
"""The label of a run's pods: the name of its RayJob."""
DIGEST = "dde-spec-sha256"
PREFIX = "dde-prefix"
"""The annotation with the attempt's folder in storage."""
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
SCALED = "workers"
"""The worker group whose size a run decides."""
GPU = "nvidia.com/gpu"
TOKEN_SECRET = "dde-ray-token"
TTL_S = 600
LEAST_RAY = (2, 52)
"""The first version of Ray with authentication by token."""
MAX_NAME = 47
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

_FILLED = {
    "entrypoint",
    "jobId",
    "metadata",
    "submissionMode",
    "backoffLimit",
    "suspend",
    "shutdownAfterJobFinishes",
    "preRunningDeadlineSeconds",
    "activeDeadlineSeconds",
}
_SPEC = {"ttlSecondsAfterFinished", "managedBy", "rayClusterSpec"}
_CLUSTER = {
    "authOptions",
    "autoscalerOptions",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "headServiceAnnotations",
    "historyServerOptions",
    "managedBy",
    "networkPolicy",
    "rayVersion",
    "tlsOptions",
    "upgradeStrategy",
    "workerGroupSpecs",
}
_SIZE = ("replicas", "minReplicas", "maxReplicas")


@dataclass(frozen=True)
class Options:
    """What is the same in all RayJobs of an installation. ``installation`` tells its RayJobs from others'."""

    installation: str
    image: str | None = None
    queue: str | None = None
    priority: str | None = None


@dataclass(frozen=True)
class Template:
    """A RayJob without what a run fills in, as read from a file and found to be usable."""

    body: Object

    @classmethod
    def load(cls, path: Path, *, with_gpus: bool = False) -> Template:
        """Raises BadRequest that names the field for a file that no run could be made from.

        ``with_gpus``: the runs' workers use GPUs, so the group of workers must have some.
        """
        try:
            documents = [each for each in yaml.safe_load_all(path.read_text()) if each is not None]
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise _unusable(path, f"cannot be read: {error}") from error
        if len(documents) != 1:
            raise _unusable(path, f"must have one document, got {len(documents)}")
        _Check(path).template(documents[0], with_gpus)
        return cls(documents[0])

    def rayjob(self, run: Run, options: Options) -> Object:
        """The RayJob of a run. Raises Refused for a run whose id can be no name."""
        body = copy.deepcopy(self.body)
        meta = body.setdefault("metadata", {})
        name = name_of(run.id)
        if len(name) > MAX_NAME or not _NAME.fullmatch(name):
            message = (
                f"run {run.id}: the name of a RayJob has at most {MAX_NAME} of a-z, 0-9 and -, got {name}"
            )
            raise Refused(message)
        meta["name"] = name
        meta["labels"] = {**meta.get("labels", {}), **_labels(run, options)}
        spec = body["spec"]
        spec.setdefault("ttlSecondsAfterFinished", TTL_S)
        spec |= {
            "entrypoint": run.command,
            "jobId": run.id,
            "metadata": dict(run.metadata),
            # The other modes kill a live job when the stream of its log breaks.
            "submissionMode": "HTTPMode",
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            **_seconds("preRunningDeadlineSeconds", run.starts_within_s),
            **_seconds("activeDeadlineSeconds", run.ends_within_s),
        }
        _fill_cluster(spec["rayClusterSpec"], name, run.needs, options)
        meta["annotations"] = {**meta.get("annotations", {}), PREFIX: run.prefix, DIGEST: digest(spec)}
        return body


def name_of(run_id: str) -> str:
    """The name of a run's RayJob: ``ajob-<24 hex>-train-a1``."""
    return run_id.replace("_", "-")


def digest(spec: Mapping[str, Any]) -> str:
    """The SHA-256 of a spec."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _labels(run: Run, options: Options) -> dict[str, str]:
    about = run.metadata
    labels = {
        MANAGED_BY: MANAGER,
        INSTALLATION: options.installation,
        JOB: about.get("job", ""),
        STAGE: about.get("stage", ""),
        ATTEMPT: about.get("attempt", ""),
        PROJECT: about.get("project", "").rstrip("-"),  # a label ends in a letter or digit
        QUEUE: options.queue or "",
        PRIORITY: options.priority or "",
    }
    return {key: value for key, value in labels.items() if value}


def _seconds(name: str, limit_s: float | None) -> dict[str, int]:
    return {} if limit_s is None else {name: max(1, math.ceil(limit_s))}


def _fill_cluster(cluster: Object, name: str, needs: Needs, options: Options) -> None:
    cluster.setdefault("rayVersion", version("ray"))
    cluster.setdefault("authOptions", {"mode": "token", "secretName": TOKEN_SECRET})
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        labels = group["template"].setdefault("metadata", {}).setdefault("labels", {})
        labels[RUN] = name
        if options.image:
            group["template"]["spec"]["containers"][0]["image"] = options.image
    workers = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == SCALED)
    least = pods_for(needs.least, needs.gpus, _gpus_of(workers))
    most = pods_for(needs.most, needs.gpus, _gpus_of(workers))
    if least < most and "autoscalerOptions" in cluster:
        cluster["enableInTreeAutoscaling"] = True
    else:
        most = least  # without the autoscaler, no pod is ever added
    workers |= {"replicas": least, "minReplicas": least, "maxReplicas": most}


def pods_for(workers: int, gpus: int, gpus_of_pod: int) -> int:
    """The pods that hold so many workers of ``gpus`` GPUs each. Without GPUs, each has a pod of its own."""
    in_pod = max(1, gpus_of_pod // gpus) if gpus else 1
    return math.ceil(workers / in_pod)


def _gpus_of(group: Object) -> int:
    resources = group["template"]["spec"]["containers"][0].get("resources", {})
    return int(resources.get("limits", {}).get(GPU, 0))


def _unusable(path: Path, why: str) -> BadRequest:
    return BadRequest(f"rayjob_template {path}: {why}", param="rayjob_template")


@dataclass(frozen=True)
class _Check:
    """Raises BadRequest for the first field of a template that is wrong."""

    path: Path

    def fail(self, field: str, why: str) -> NoReturn:
        raise _unusable(self.path, f"{field} {why}")

    def template(self, body: Any, with_gpus: bool) -> None:
        self.fields("the document", body, {"apiVersion", "kind", "metadata", "spec"})
        for field, value in (("apiVersion", "ray.io/v1"), ("kind", "RayJob")):
            if body.get(field) != value:
                self.fail(field, f"must be {value}, got {body.get(field)!r}")
        self.metadata(body.get("metadata", {}))
        spec = self.mapping("spec", body.get("spec"))
        for field in sorted(_FILLED & spec.keys()):
            self.fail(f"spec.{field}", "is filled in for each run: remove it")
        self.fields("spec", spec, _SPEC)
        ttl = spec.get("ttlSecondsAfterFinished", TTL_S)
        if not _is_count(ttl):
            self.fail("spec.ttlSecondsAfterFinished", f"must be a number of seconds, got {ttl!r}")
        self.cluster(spec.get("rayClusterSpec"), with_gpus)

    def metadata(self, meta: Any) -> None:
        self.fields("metadata", meta, {"name", "labels", "annotations"})
        for field in ("labels", "annotations"):
            given = self.mapping(f"metadata.{field}", meta.get(field, {}))
            for key, value in given.items():
                if not isinstance(value, str):
                    self.fail(f"metadata.{field}.{key}", f"must be a string, got {value!r}")

    def cluster(self, cluster: Any, with_gpus: bool) -> None:
        where = "spec.rayClusterSpec"
        for field in ("suspend", "enableInTreeAutoscaling"):
            if field in self.mapping(where, cluster):
                self.fail(f"{where}.{field}", "is filled in for each run: remove it")
        self.fields(where, cluster, _CLUSTER)
        self.ray_version(cluster.get("rayVersion", version("ray")))
        auth = self.mapping(f"{where}.authOptions", cluster.get("authOptions", {"mode": "token"}))
        if auth.get("mode") != "token":
            self.fail(f"{where}.authOptions.mode", f"must be token, got {auth.get('mode')!r}")
        if "authOptions" in cluster and not auth.get("secretName"):
            self.fail(f"{where}.authOptions.secretName", "must name the Secret with the token of Ray")
        self.group(f"{where}.headGroupSpec", cluster.get("headGroupSpec"))
        groups = cluster.get("workerGroupSpecs")
        if not isinstance(groups, list):
            self.fail(f"{where}.workerGroupSpecs", f"must be a list of groups, got {groups!r}")
        names = [self.group_name(f"{where}.workerGroupSpecs[{i}]", group) for i, group in enumerate(groups)]
        if names.count(SCALED) != 1 or len(set(names)) < len(names):
            why = f"must have one group named {SCALED!r}, and others of different names, got {names}"
            self.fail(f"{where}.workerGroupSpecs", why)
        for index, group in enumerate(groups):
            self.worker_group(f"{where}.workerGroupSpecs[{index}]", group, with_gpus)

    def ray_version(self, given: Any) -> None:
        numbers = re.match(r"(\d+)\.(\d+)", given) if isinstance(given, str) else None
        if numbers is None or (int(numbers[1]), int(numbers[2])) < LEAST_RAY:
            least = ".".join(map(str, LEAST_RAY))
            self.fail("spec.rayClusterSpec.rayVersion", f"must be a text from {least} on, got {given!r}")

    def group_name(self, where: str, group: Any) -> str:
        name = self.mapping(where, group).get("groupName")
        if not isinstance(name, str):
            self.fail(f"{where}.groupName", f"must be a name, got {name!r}")
        return name

    def worker_group(self, where: str, group: Object, with_gpus: bool) -> None:
        self.group(where, group)
        sizes = [field for field in _SIZE if field in group]
        if group["groupName"] != SCALED:
            for field in _SIZE:
                if not _is_count(group.get(field)):
                    self.fail(f"{where}.{field}", f"must be a number of pods, got {group.get(field)!r}")
            return
        if sizes:
            self.fail(f"{where}.{sizes[0]}", "is filled in for each run: remove it")
        if group.get("numOfHosts", 1) != 1:
            self.fail(f"{where}.numOfHosts", f"must be 1 or absent, got {group['numOfHosts']!r}")
        limits = f"{where}.template.spec.containers[0].resources.limits"
        resources = self.mapping(limits, group["template"]["spec"]["containers"][0].get("resources", {}))
        given = self.mapping(limits, resources.get("limits", {})).get(GPU, 0)
        if not re.fullmatch(r"\d+", str(given)) or (with_gpus and int(given) < 1):
            least = "at least 1, as use_gpu is set" if with_gpus else "a number of GPUs"
            self.fail(f"{limits}.{GPU}", f"must be {least}, got {given!r}")

    def group(self, where: str, group: Any) -> None:
        """A head or a group of workers: pods with a Ray container."""
        params = self.mapping(f"{where}.rayStartParams", self.mapping(where, group).get("rayStartParams", {}))
        for key, value in params.items():
            if not isinstance(value, str):
                self.fail(f"{where}.rayStartParams.{key}", f"must be a string, got {value!r}")
        pod = self.mapping(f"{where}.template", group.get("template"))
        labels = self.mapping(f"{where}.template.metadata", pod.get("metadata", {})).get("labels", {})
        self.mapping(f"{where}.template.metadata.labels", labels)
        containers = self.mapping(f"{where}.template.spec", pod.get("spec")).get("containers")
        if not isinstance(containers, list) or not containers:
            self.fail(f"{where}.template.spec.containers", "must have the Ray container first")
        for index, container in enumerate(containers):
            field = f"{where}.template.spec.containers[{index}]"
            for key in ("name", "image"):
                given = self.mapping(field, container).get(key)
                if not isinstance(given, str) or not given:
                    self.fail(f"{field}.{key}", f"must be a text, got {given!r}")

    def mapping(self, field: str, value: Any) -> Object:
        if not isinstance(value, dict):
            self.fail(field, f"must be an object, got {value!r}")
        return value

    def fields(self, field: str, value: Any, known: set[str]) -> None:
        unknown = sorted(map(str, self.mapping(field, value).keys() - known))
        if unknown:
            self.fail(
                field, f"has unknown fields: {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
