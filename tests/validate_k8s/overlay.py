"""An overlay as kustomize renders it, with the documents inside of its documents."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from services.control.launchers.contract import Run
from services.control.launchers.rayjob import Options, Template

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("local", "gpu", "production")
CLUSTER_FIELD = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
RAY_KINDS = ("RayCluster", "RayJob", "RayService")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def at(value: Any, *path: str | int, default: Any = None) -> Any:
    """What lies at the path, or the default (an empty dict) where a part of it is missing."""
    default = {} if default is None else default
    for step in path:
        is_key = isinstance(value, dict) and step in value
        is_index = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if not is_key and not is_index:
            return default
        value = value[step]
    return default if value is None else value


@dataclass
class Pod:
    """A pod template. ``group`` is the name of a Ray group, "head" for the head's, "" for others."""

    owner: dict
    template: dict
    group: str

    @property
    def title(self) -> str:
        return "/".join(part for part in (title(self.owner), self.group) if part)

    @property
    def kind(self) -> str:
        return self.owner["kind"]

    @property
    def spec(self) -> dict:
        return at(self.template, "spec")

    @property
    def labels(self) -> dict:
        """With those that KubeRay adds."""
        labels = at(self.template, "metadata", "labels")
        if self.kind not in RAY_KINDS:
            return labels
        return {**labels, "ray.io/node-type": "head" if self.group == "head" else "worker"}

    @property
    def part(self) -> str:
        return self.labels.get("dde-part", "")

    @property
    def containers(self) -> list[dict]:
        """With Ray's autoscaler, whose container KubeRay adds to the head from ``autoscalerOptions``."""
        found = [*at(self.spec, "initContainers", default=[]), *at(self.spec, "containers", default=[])]
        cluster = cluster_of(self.owner)
        if self.group == "head" and at(cluster, "enableInTreeAutoscaling", default=False):
            options = at(cluster, "autoscalerOptions")
            image = at(self.spec, "containers", 0, "image", default="")
            found.append({"name": "autoscaler", "image": image, **options})
        return found

    @property
    def own_containers(self) -> list[dict]:
        return at(self.spec, "containers", default=[])

    @property
    def gpus(self) -> int:
        return sum(
            int(at(c, "resources", "limits", "nvidia.com/gpu", default=0)) for c in self.own_containers
        )

    @property
    def ports(self) -> dict[str, int]:
        """With the metrics port that KubeRay adds to Ray's containers."""
        ports = {"metrics": 8080} if self.kind in RAY_KINDS else {}
        for container in self.own_containers:
            ports |= {at(p, "name", default=""): p["containerPort"] for p in container.get("ports", [])}
        return ports


def title(document: dict) -> str:
    return f"{document.get('kind')}/{at(document, 'metadata', 'name', default='?')}"


def cluster_of(document: dict) -> dict:
    """The RayClusterSpec of a RayCluster, RayJob or RayService; {} for other kinds."""
    if document.get("kind") not in RAY_KINDS:
        return {}
    spec = at(document, "spec")
    return at(spec, CLUSTER_FIELD[document["kind"]]) if document["kind"] in CLUSTER_FIELD else spec


@dataclass
class Overlay:
    """``documents`` include the RayJob inside of ConfigMap ``dde-rayjob`` and the Serve config of the
    RayService, as documents of their own (kinds RayJob and ServeConfig).
    """

    name: str
    documents: list[dict] = field(default_factory=list)

    def of(self, *kinds: str) -> list[dict]:
        return [document for document in self.documents if document.get("kind") in kinds]

    def named(self, kind: str, name: str) -> dict | None:
        for document in self.of(kind):
            if at(document, "metadata", "name", default="") == name:
                return document
        return None

    @property
    def config(self) -> dict[str, str]:
        """The data of ConfigMap ``dde-config``."""
        for document in self.of("ConfigMap"):
            if at(document, "metadata", "name", default="").startswith("dde-config"):
                return at(document, "data")
        return {}

    @property
    def ray(self) -> list[dict]:
        return self.of(*RAY_KINDS)

    def pods(self) -> Iterator[Pod]:
        for document in self.documents:
            if document.get("kind") in ("Deployment", "StatefulSet", "Job"):
                yield Pod(document, at(document, "spec", "template"), "")
            elif document.get("kind") in RAY_KINDS:
                cluster = cluster_of(document)
                yield Pod(document, at(cluster, "headGroupSpec", "template"), "head")
                for group in at(cluster, "workerGroupSpecs", default=[]):
                    yield Pod(document, at(group, "template"), at(group, "groupName", default="?"))


def build(name: str) -> Overlay:
    """Render with kustomize. Raises CalledProcessError with kubectl's message."""
    kubectl = Path(sys.executable).parent / "kubectl"
    command = [str(kubectl), "kustomize", str(K8S / "overlays" / name)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    documents = [document for document in yaml.load_all(text, LOADER) if document]
    return Overlay(name, [*documents, *(inner for d in documents for inner in _inside(d))])


def _inside(document: dict) -> Iterator[dict]:
    if document["kind"] == "ConfigMap" and "rayjob.yaml" in at(document, "data"):
        yield filled_in(yaml.load(document["data"]["rayjob.yaml"], LOADER))
    if document["kind"] == "RayService":
        yield {"kind": "ServeConfig", **yaml.load(document["spec"]["serveConfigV2"], LOADER)}


def filled_in(template: dict) -> dict:
    """The template with what the control plane writes into it."""
    job = f"ajob_{'0' * 24}"
    prefix = "s3://bucket/jobs/job/evaluate/a99"
    run = Run(
        id=f"{job}_evaluate_a99",
        command=f"python -m services.evaluation --spec {prefix}/spec.json",
        prefix=prefix,
        metadata={"job": job, "stage": "evaluate", "attempt": "99", "project": "default"},
        starts_within_s=3600,
    )
    document = Template(template).rayjob(run, Options(installation="dde"))
    document["metadata"]["namespace"] = "dde"
    return document
