"""Kinds of objects of the stand-in API server, what every object's metadata must be, and the answers to what
is wrong.
"""

from __future__ import annotations

import re
import secrets
import string
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.kube.schema import Cause, Json, read_crd

_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_PART = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_MAX_ANNOTATION_BYTES = 256 * 1024


class ApiError(Exception):
    """What the server answers instead: an HTTP status, a reason, a message and details."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details

    def status(self) -> Json:
        """The Status object of the answer."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        }


@dataclass(frozen=True)
class Resource:
    """A kind of object. Without a schema, its fields are not checked."""

    group: str
    version: str
    plural: str
    kind: str
    schema: Json | None = None
    fields: tuple[str, ...] = ()
    """What a field selector may name, besides metadata.name and metadata.namespace."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}".lstrip("/")

    @property
    def has_status(self) -> bool:
        """Whether the status has a subresource of its own."""
        return bool(self.group) or self.plural == "pods"

    @property
    def full_name(self) -> str:
        """``rayjobs.ray.io``, ``pods``."""
        return f"{self.plural}.{self.group}".rstrip(".")


def resources(crds: Path | None) -> dict[str, Resource]:
    """By plural: those of KubeRay, with the schemas in the folder ``crds``, and those of the core."""
    found = {}
    for plural, kind in (("rayjobs", "RayJob"), ("rayclusters", "RayCluster")):
        schema = read_crd(crds / f"ray.io_{plural}.yaml").schema if crds else None
        found[plural] = Resource("ray.io", "v1", plural, kind, schema)
    event_fields = ("involvedObject.name", "involvedObject.kind", "involvedObject.uid", "reason", "type")
    core = {
        "pods": Resource("", "v1", "pods", "Pod", fields=("status.phase", "spec.nodeName")),
        "events": Resource("", "v1", "events", "Event", fields=event_fields),
        "services": Resource("", "v1", "services", "Service"),
        "configmaps": Resource("", "v1", "configmaps", "ConfigMap"),
        "secrets": Resource("", "v1", "secrets", "Secret", fields=("type",)),
    }
    return found | core


def now() -> str:
    """The time as Kubernetes writes it: RFC 3339 in UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def merge(target: Any, patch: Any) -> Any:
    """The target with a JSON merge patch applied (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge(merged.get(name), value)
    return merged


def invalid(kind: Resource, name: str, causes: list[Cause]) -> ApiError:
    """The answer 422 to an object that violates its schema."""
    texts = [str(each) for each in causes]
    shown = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    listed = [{"reason": each.reason, "message": each.message, "field": each.field} for each in causes]
    message = f'{kind.kind}.{kind.group} "{name}" is invalid: {shown}'
    details = {"name": name, "group": kind.group, "kind": kind.kind, "causes": listed}
    return ApiError(422, "Invalid", message, **details)


def metadata_causes(meta: Json) -> list[Cause]:
    name = meta.get("name") or ""
    found = []
    if not name:
        found.append(
            Cause("metadata.name", "FieldValueRequired", "Required value: name or generateName is required")
        )
    elif len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        found.append(
            Cause(
                "metadata.name",
                "FieldValueInvalid",
                f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case '
                "alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character",
            )
        )
    for key, value in (meta.get("labels") or {}).items():
        if not _is_label_key(key):
            found.append(
                Cause("metadata.labels", "FieldValueInvalid", f'Invalid value: "{key}": not a label key')
            )
        if not isinstance(value, str) or len(value) > 63 or not _LABEL_VALUE.fullmatch(value):
            found.append(
                Cause(
                    "metadata.labels",
                    "FieldValueInvalid",
                    f'Invalid value: "{value}": a valid label must be at most 63 alphanumeric characters, '
                    "'-', '_' or '.', and must start and end with an alphanumeric character",
                )
            )
    annotations = meta.get("annotations") or {}
    if sum(len(key) + len(value) for key, value in annotations.items()) > _MAX_ANNOTATION_BYTES:
        found.append(
            Cause(
                "metadata.annotations",
                "FieldValueTooLong",
                f"Too long: may not be more than {_MAX_ANNOTATION_BYTES} bytes",
            )
        )
    return found


def _is_label_key(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    if len(name) > 63 or not _PART.fullmatch(name):
        return False
    return not slash or (len(prefix) <= 253 and bool(_SUBDOMAIN.fullmatch(prefix)))


def details_of(kind: Resource, name: str) -> Json:
    return {"name": name, "group": kind.group, "kind": kind.plural}


def not_found(full_name: str, missing: str, **details: Any) -> ApiError:
    return ApiError(404, "NotFound", f'{full_name} "{missing}" not found', **details)


def conflict(kind: Resource, name: str) -> ApiError:
    return ApiError(
        409,
        "Conflict",
        f'Operation cannot be fulfilled on {kind.full_name} "{name}": the object has been modified; '
        "please apply your changes to the latest version and try again",
        **details_of(kind, name),
    )


def without(item: Json, *names: str) -> Json:
    return {name: value for name, value in item.items() if name not in names}


def random_suffix() -> str:
    return "".join(secrets.choice(string.ascii_lowercase) for _ in range(5))
