"""A small RayJob, for tests."""

from __future__ import annotations

import copy
from typing import Any

from tests.support.kube.schema import Json

TOKEN_SECRET = "dde-ray-token"


def ray_job(name: str, **spec: Any) -> Json:
    """A RayJob in HTTPMode with a head and two workers. ``spec`` replaces fields of its spec."""
    template = {"spec": {"containers": [{"name": "ray", "image": "dde-ray@sha256:0"}]}}
    group = {"groupName": "gpu", "replicas": 2, "minReplicas": 2, "maxReplicas": 2, "rayStartParams": {}}
    cluster = {
        "rayVersion": "2.60.0",
        "authOptions": {"mode": "token", "secretName": TOKEN_SECRET},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": template},
        "workerGroupSpecs": [group | {"template": copy.deepcopy(template)}],
    }
    default = {
        "entrypoint": "true",
        "jobId": f"{name}-submission",
        "submissionMode": "HTTPMode",
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": cluster,
    }
    meta = {"name": name, "labels": {"app.kubernetes.io/managed-by": "dde"}}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": meta, "spec": default | spec}
