"""Schemas: Kubernetes' own, KubeRay's CRDs with unknown fields refused, and tables for third parties."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import yaml

from tests.validate_k8s import third_party
from tests.validate_k8s.overlay import LOADER, RAY_KINDS, at

KUBERNETES = "v1.37.0-local-strict"


def crds() -> Path | None:
    """The folder of KubeRay's CRDs, which the variable KUBERAY_CRDS names."""
    folder = os.environ.get("KUBERAY_CRDS")
    return Path(folder) if folder else None


def source_of(kind: str) -> str:
    """What a document of this kind is checked against; "" for nothing."""
    if kind in RAY_KINDS:
        return "KubeRay's CRDs" if crds() else ""
    if kind == "ServeConfig":
        return "Ray Serve's schema"
    if kind in third_party.SCHEMAS:
        return "our field tables"
    return "Kubernetes' schemas"


def refusals(document: dict) -> list[str]:
    """What the schema of the document's kind refuses. Without KUBERAY_CRDS, KubeRay's kinds have none."""
    if not _is_named(document):
        return ["metadata.name is missing"]
    validator = _validator(document.get("kind", ""), document.get("apiVersion", ""))
    if validator is None:
        return []
    return [f"{_path(error)}: {error.message}" for error in validator.iter_errors(document)]


def is_accepted(document: dict) -> bool:
    """The fast form of ``not refusals(document)``."""
    if not _is_named(document):
        return False
    validator = _validator(document.get("kind", ""), document.get("apiVersion", ""))
    return validator is None or validator.is_valid(document)


def _is_named(document: dict) -> bool:
    """Kubernetes' schemas do not require what its server does."""
    return document.get("kind") == "ServeConfig" or bool(at(document, "metadata", "name", default=""))


def _path(error: Any) -> str:
    return ".".join(str(step) for step in error.instance_path)


@cache
def _validator(kind: str, api_version: str) -> Any:
    if kind == "ServeConfig":
        return None  # checked by Ray's model in tests.validate_k8s.serve
    if kind in RAY_KINDS:
        return _kuberay(kind, api_version)
    if kind in third_party.SCHEMAS:
        return jsonschema_rs.Draft202012Validator(third_party.SCHEMAS[kind])
    return _core(kind, api_version)


def _refuse_all(reason: str) -> Any:
    return jsonschema_rs.Draft202012Validator({"not": {}, "description": reason})


def _kuberay(kind: str, api_version: str) -> Any:
    folder = crds()
    if folder is None:
        return None
    crd = yaml.load((folder / f"ray.io_{kind.lower()}s.yaml").read_text(), LOADER)
    group = crd["spec"]["group"]
    for version in crd["spec"]["versions"]:
        if f"{group}/{version['name']}" == api_version:
            return jsonschema_rs.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))
    return _refuse_all(f"KubeRay serves no {api_version} {kind}")


def closed(schema: Any) -> Any:
    """The same schema, but refusing unknown fields. KubeRay's CRDs accept them."""
    if not isinstance(schema, dict):
        return schema
    found = {
        key: closed(value) for key, value in schema.items() if key not in ("properties", "enum", "default")
    }
    found |= {key: schema[key] for key in ("enum", "default") if key in schema}
    if "properties" in schema:
        found["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    return found


@cache
def _definitions() -> dict:
    return json.loads((_folder() / "_definitions.json").read_text())


def _folder() -> Any:
    return importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / KUBERNETES


def _core(kind: str, api_version: str) -> Any:
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    file = _folder() / f"{kind.lower()}-{group}.json"
    if not kind or not file.is_file():
        return _refuse_all(f"Kubernetes has no {api_version} {kind}")
    text = file.read_text().replace("/api/_definitions.json#", "#")
    schema = json.loads(text)
    definitions = json.loads(json.dumps(_definitions()["$defs"]).replace("/api/_definitions.json#", "#"))
    return jsonschema_rs.Draft202012Validator({**schema, "$defs": _reachable(schema, definitions)})


def _reachable(schema: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The definitions that the schema needs, so that a validator is made in milliseconds."""
    found: dict[str, Any] = {}
    waiting = [schema]
    while waiting:
        for name in re.findall(r'"#/\$defs/([^"]+)"', json.dumps(waiting.pop())):
            if name not in found:
                found[name] = definitions[name]
                waiting.append(definitions[name])
    return found
