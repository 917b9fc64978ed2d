"""What a container runs: its image, variables, command, mounts and probes."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.validate_k8s import facts
from tests.validate_k8s.overlay import Overlay, Pod, at, cluster_of
from tests.validate_k8s.references import config_maps

PROBES = {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


def findings(overlay: Overlay) -> Iterator[str]:
    for pod in overlay.pods():
        for container in pod.containers:
            where = f"{pod.title}: {container.get('name')}"
            for check in (_image, _environment, _command, _mounts, _probes):
                yield from (f"{where}: {message}" for message in check(overlay, pod, container))


def _image(overlay: Overlay, pod: Pod, container: dict) -> Iterator[str]:
    reference = container.get("image", "")
    config = overlay.config
    ours = {
        "control": config.get("CONTROL_IMAGE"),
        "migrate": config.get("CONTROL_IMAGE"),
        "bucket": config.get("CONTROL_IMAGE"),
        "train": config.get("DDE_RAYJOB_IMAGE"),
        "serve": config.get("DDE_RAYJOB_IMAGE"),
    }
    if not facts.image_of(reference):
        yield f"image {reference!r} is not one that is known, with its version"
    elif pod.part in ours and reference != ours[pod.part]:
        yield f"image {reference!r} is not that of settings.env, {ours[pod.part]!r}"
    elif (
        pod.kind == "RayJob"
        and reference.rsplit("/", 1)[-1]
        != config.get("DDE_RAYJOB_IMAGE", "").rsplit("/", 1)[-1].split("@")[0]
    ):
        yield f"image {reference!r} has another version than DDE_RAYJOB_IMAGE"
    if container.get("imagePullPolicy"):
        yield "imagePullPolicy is set"


def _environment(overlay: Overlay, pod: Pod, container: dict) -> Iterator[str]:
    image = facts.image_of(container.get("image", ""))
    names = [entry["name"] for entry in container.get("env", [])]
    unknown = set(names) - (image.variables if image else set())
    if unknown or len(set(names)) < len(names):
        yield f"nothing reads the variables {sorted(unknown)}, or one is given twice"
    known = facts.secret_keys(overlay.name)
    for entry in container.get("env", []):
        source = at(entry, "valueFrom", "secretKeyRef")
        if ("valueFrom" in entry) == ("value" in entry) or ("valueFrom" in entry and not source):
            yield f"{entry['name']} needs a value, or a Secret's"
        if source and (
            source.get("key") not in known.get(source.get("name", ""), []) or source.get("optional")
        ):
            yield f"{entry['name']}: make-secrets.py makes no {source}"
        if _is_secret(entry["name"]) and source != _secret_of(entry["name"]):
            yield f"{entry['name']}: it is {_secret_of(entry['name'])}"
    for source in container.get("envFrom", []):
        yield from _env_from(overlay, source)
    yield from _needed(overlay, pod, container, set(names))


SECRET_VARIABLES = {
    "DDE_API_KEY": ("dde-control", "api_key"),
    "DDE_DATABASE_URL": ("dde-control", "database_url"),
    "POSTGRES_PASSWORD": ("dde-control", "postgres_password"),
    "REDIS_PASSWORD": ("dde-ray-token", "redis_password"),
    "AWS_ACCESS_KEY_ID": ("dde-object-store", "AWS_ACCESS_KEY_ID"),
    "AWS_SECRET_ACCESS_KEY": ("dde-object-store", "AWS_SECRET_ACCESS_KEY"),
}


def _is_secret(name: str) -> bool:
    return name in SECRET_VARIABLES


def _secret_of(name: str) -> dict:
    secret, key = SECRET_VARIABLES[name]
    return {"name": secret, "key": key}


def _env_from(overlay: Overlay, source: dict) -> Iterator[str]:
    if set(source) == {"configMapRef"}:
        if (
            at(source, "configMapRef", "name", default="") not in config_maps(overlay)
            or len(source["configMapRef"]) > 1
        ):
            yield f"envFrom: there is no ConfigMap {source['configMapRef']}"
        return
    name = at(source, "secretRef", "name", default="")
    optional = at(source, "secretRef", "optional", default=False)
    made = facts.secret_keys(overlay.name)
    may_miss = facts.optional_secrets(overlay.name)
    if set(source) != {"secretRef"} or (name not in made and name not in may_miss):
        yield f"envFrom: nobody makes {source}"
    elif name in may_miss and not optional:
        yield f"envFrom: the pod waits for ever where Secret {name} was not made: it must be optional"


NEEDED = {
    "control": ({"DDE_API_KEY", "DDE_DATABASE_URL", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"},
                {"dde-config", "dde-object-store"}),
    "migrate": ({"DDE_API_KEY", "DDE_DATABASE_URL"}, {"dde-config"}),
    "train": (set(), {"dde-object-store", "dde-trackers"}),
    "align": (set(), {"dde-object-store"}),
    "serve": ({"DDE_STORAGE_URI"}, {"dde-object-store"}),
    "redis": ({"REDIS_PASSWORD"}, set()),
    "postgres": ({"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "PGDATA"}, set()),
    "s3": ({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}, set()),
    "bucket": ({"BUCKET"}, {"dde-object-store"}),
}  # fmt: skip
"""The variables, and the sources of further ones, that the pods of each part need."""


def _needed(overlay: Overlay, pod: Pod, container: dict, names: set[str]) -> Iterator[str]:
    if container.get("name") == "autoscaler":
        if names or container.get("envFrom"):
            yield "Ray's autoscaler needs no variable of ours"
        return
    needed, sources = NEEDED.get(pod.part, (set(), set()))
    missing = needed - names
    if missing:
        yield f"the variables {sorted(missing)} are missing"
    refs = [ref for source in container.get("envFrom", []) for ref in source.values()]
    given = {re.sub(r"^(dde-config)-.*", r"\1", ref.get("name", "")) for ref in refs}
    if given != sources and not (pod.part == "align" and given == sources | {"dde-trackers"}):
        yield f"envFrom reads {sorted(given)}, not {sorted(sources)}"
    yield from _values(overlay, pod, {e["name"]: e.get("value") for e in container.get("env", [])})


def _values(overlay: Overlay, pod: Pod, values: dict[str, Any]) -> Iterator[str]:
    storage = overlay.config.get("DDE_STORAGE_URI", "")
    expected = {
        "DDE_STORAGE_URI": storage,
        "BUCKET": urlsplit(storage).netloc,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": "/etc/dde-ray/auth_token",
    }
    if overlay.name == "local":
        database = urlsplit(_local_database())
        expected |= {
            "POSTGRES_USER": unquote(database.username or ""),
            "POSTGRES_DB": database.path.strip("/"),
        }
        expected["PGDATA"] = "/var/lib/postgresql/data/pgdata"  # not the volume itself, which has lost+found
    for name in set(values) & set(expected):
        if values[name] != expected[name]:
            yield f"{name} is {values[name]!r}, not {expected[name]!r}"


@cache
def _local_database() -> str:
    arguments = type("Arguments", (), {"local": True, "object_store": False, "database_url": None})()
    return facts.secrets_script().wanted(arguments)["dde-control"]["database_url"]


COMMANDS = {
    "control": "",  # the image's own
    "migrate": "python -m services.control migrate",
    "redis": "redis-server --dir /data --appendonly yes --maxmemory-policy noeviction "
    "--requirepass $(REDIS_PASSWORD)",
    "s3": "weed -logtostderr server -dir=/data -ip.bind=0.0.0.0 -s3 -s3.port=8333",
}
"""What runs in a container, by part, where the image's own command does not."""


def _command(overlay: Overlay, pod: Pod, container: dict) -> Iterator[str]:
    image = facts.image_of(container.get("image", ""))
    words = [*container.get("command", []), *container.get("args", [])]
    hooks = [at(container, "lifecycle", "preStop", "exec", "command", default=[])]
    hooks += [at(container, probe, "exec", "command", default=[]) for probe in PROBES]
    for run in [words, *filter(None, hooks)]:
        if run and image and run[0] not in image.executables:
            yield f"its image has no {run[0]!r}"
    if pod.kind in ("Deployment", "StatefulSet", "Job") and container.get("name") != pod.part:
        yield f"it is not called after its part, {pod.part!r}"
    if pod.part in COMMANDS and " ".join(words) != COMMANDS[pod.part]:
        yield f"it runs {' '.join(words)!r}, not {COMMANDS[pod.part]!r}"
    if cluster_of(pod.owner) and words:
        yield "KubeRay writes the command"
    if words[:2] == ["python", "-m"]:
        if not facts.runs_as_module(words[2]) or not set(words[3:]) <= facts.words_of(words[2]):
            yield f"`{shlex.join(words)}` runs nothing of this repository"
    elif pod.part == "bucket":
        if words[:2] != ["python", "-c"] or len(words) != 3:
            yield "it runs no script"
        else:
            yield from _script(words[2], container)
    for name in re.findall(r"\$\((\w+)\)", " ".join(words)):
        if name not in [entry["name"] for entry in container.get("env", [])]:
            yield f"$({name}) is no variable of the container"
    if pod.part == "postgres" and hooks[-1] != ["pg_isready", "-U", "dde", "-d", "dde"]:
        yield "readinessProbe does not ask PostgreSQL"
    if pod.part == "control" and hooks[0] != ["sleep", "5"]:
        yield "preStop does not wait until no load balancer sends new requests"


def _script(text: str, container: dict) -> Iterator[str]:
    try:
        statements = ast.parse(text).body
    except SyntaxError as error:
        yield f"its script: {error}"
        return
    calls = [s for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call)]
    modules = [alias.name for s in statements if isinstance(s, ast.Import) for alias in s.names]
    if len(calls) != 1 or modules != ["os", "boto3"] or len(statements) != 3:
        yield "its script is not two imports and a call"
    names = re.findall(r"os\.environ\[\"(\w+)\"\]", text)
    if not set(names) <= {e["name"] for e in container.get("env", [])} or "create_bucket(Bucket=" not in text:
        yield "its script does not create the bucket of its variable"


MOUNTS = {
    "control": {"tmp": "/tmp", "rayjob": "/etc/dde", "ray-token": "/etc/dde-ray"},
    "migrate": {"tmp": "/tmp"},
    "redis": {"data": "/data"},
    "postgres": {"data": "/var/lib/postgresql/data"},
    "s3": {"data": "/data"},
}


def _mounts(overlay: Overlay, pod: Pod, container: dict) -> Iterator[str]:
    given = {m.get("name"): m.get("mountPath") for m in container.get("volumeMounts", [])}
    if container.get("name") != "autoscaler" and given != MOUNTS.get(pod.part, {}):
        yield f"it mounts {given}, not {MOUNTS.get(pod.part, {})}"
    for mount in container.get("volumeMounts", []):
        writes = mount.get("name") in ("tmp", "data")
        if bool(mount.get("readOnly")) == writes or set(mount) - {"name", "mountPath", "readOnly"}:
            yield f"volume {mount.get('name')}: readOnly is wrong"
    if pod.part == "control":
        token = f"{given.get('ray-token')}/auth_token"
        paths = {f"{given.get('rayjob')}/rayjob.yaml": overlay.config.get("DDE_RAYJOB_TEMPLATE")}
        paths |= {
            token: {e["name"]: e.get("value") for e in container.get("env", [])}.get("RAY_AUTH_TOKEN_PATH")
        }
        yield from (
            f"{there} is not where it is read, {read}" for there, read in paths.items() if there != read
        )


NEEDED_PROBES = {
    "control": set(PROBES),
    "redis": {"livenessProbe", "readinessProbe"},
    "postgres": {"readinessProbe"},
    "s3": {"readinessProbe"},
}


def _probes(overlay: Overlay, pod: Pod, container: dict) -> Iterator[str]:
    needed = NEEDED_PROBES.get(pod.part, set())
    given = {probe for probe in PROBES if probe in container}
    if given != needed:
        yield f"it has the probes {sorted(given)}, not {sorted(needed)}"
    names = {at(p, "name", default="") for p in container.get("ports", [])}
    for probe in given:
        actions = {a: container[probe][a] for a in ("httpGet", "tcpSocket", "exec") if a in container[probe]}
        if len(actions) != 1:
            yield f"{probe}: there must be one action"
        for action, what in actions.items():
            if action != "exec" and what.get("port") not in names:
                yield f"{probe}: there is no port {what.get('port')!r}"
            if action == "exec" and not what.get("command"):
                yield f"{probe}: there is no command"
            if action == "httpGet" and (
                what.get("path") != PROBES[probe] or what["path"] not in facts.routes()
            ):
                yield f"{probe}: its path is {what.get('path')!r}, not {PROBES[probe]!r}"
            if action == "httpGet" and set(what) != {"path", "port"}:
                yield f"{probe}: {sorted(what)}"
    if pod.part == "control":
        start = at(container, "startupProbe")
        if start.get("periodSeconds", 10) * start.get("failureThreshold", 3) < 60:
            yield "startupProbe gives less than a minute"
        for probe in ("livenessProbe", "readinessProbe"):
            if not 2 <= at(container, probe, "timeoutSeconds", default=1) <= 10:
                yield f"{probe}: timeoutSeconds are not between 2 and 10"
