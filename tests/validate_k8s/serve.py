"""The Serve config: Ray's schema, the application in the repository, its arguments, room for its replicas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

from pydantic import ValidationError

from services.serving.admission import Limits
from services.serving.args import ServeArgs
from tests.validate_k8s import facts
from tests.validate_k8s.overlay import Overlay, at, cluster_of
from tests.validate_k8s.security import quantity

APPLICATION = {"name", "route_prefix", "import_path", "args"}


def findings(overlay: Overlay) -> Iterator[str]:
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
