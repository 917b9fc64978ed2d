"""Structural schemas of custom resources: defaults, unknown fields, types and CEL rules, as an API server
applies them.

A CRD's ``openAPIV3Schema`` is walked together with an object. Paths and wording of the errors are those of
kube-apiserver: ``spec.backoffLimit: Invalid value: "string": ... must be of type integer: "string"``.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import cel
import yaml

Json = dict[str, Any]
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}
_BITS = {"int32": 31, "int64": 63}
_OBJECT_META = {"name", "generateName", "namespace", "labels", "annotations", "finalizers", "ownerReferences"}
_SERVER_META = {
    *_OBJECT_META,
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "selfLink",
}


@dataclass(frozen=True)
class Cause:
    """One entry of ``details.causes``: ``reason`` is such as FieldValueRequired."""

    field: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


@dataclass(frozen=True)
class Crd:
    """One served version of a custom resource."""

    group: str
    version: str
    plural: str
    kind: str
    schema: Json


@lru_cache
def read_crd(path: Path, version: str = "v1") -> Crd:
    """The CRD in a YAML file. Raises StopIteration if it has no such version."""
    spec = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
    served = next(each for each in spec["versions"] if each["name"] == version and each["served"])
    names = spec["names"]
    return Crd(spec["group"], version, names["plural"], names["kind"], served["schema"]["openAPIV3Schema"])


def unknown_fields(schema: Json, value: Any, path: str = "") -> list[str]:
    """The paths of fields that the schema does not know, as in ``unknown field "spec.foo"``."""
    if not path:
        meta = [f"metadata.{name}" for name in value.get("metadata") or {} if name not in _SERVER_META]
        return meta + unknown_fields(_without_meta(schema), {**value, "metadata": {}}, ".")
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    if isinstance(value, list) and "items" in schema:
        return [
            each
            for index, item in enumerate(value)
            for each in unknown_fields(schema["items"], item, f"{path}[{index}]")
        ]
    if not isinstance(value, dict):
        return []
    found = []
    for name, item in value.items():
        part = f"{path}.{name}".lstrip(".")
        if name in schema.get("properties", {}):
            found += unknown_fields(schema["properties"][name], item, part)
        elif isinstance(schema.get("additionalProperties"), dict):
            found += unknown_fields(schema["additionalProperties"], item, part)
        elif "additionalProperties" not in schema:
            found.append(part)
    return found


def _without_meta(schema: Json) -> Json:
    return {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}


def pruned(schema: Json, value: Any, path: str = "") -> Any:
    """A copy without the fields that the schema does not know."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return value
    if isinstance(value, list) and "items" in schema:
        return [pruned(schema["items"], item, f"{path}[]") for item in value]
    if not isinstance(value, dict) or not (schema.get("properties") or path == ""):
        extra = schema.get("additionalProperties")
        if isinstance(value, dict) and isinstance(extra, dict):
            return {name: pruned(extra, item, f"{path}.{name}") for name, item in value.items()}
        return {} if isinstance(value, dict) and "additionalProperties" not in schema else value
    kept = {}
    for name, item in value.items():
        if path == "" and name == "metadata":
            kept[name] = {key: each for key, each in item.items() if key in _SERVER_META}
        elif name in schema["properties"]:
            kept[name] = pruned(schema["properties"][name], item, f"{path}.{name}")
    return kept


def with_defaults(schema: Json, value: Any) -> Any:
    """A copy in which absent fields, and nulls where none may be, have the schema's defaults."""
    if isinstance(value, list) and "items" in schema:
        return [with_defaults(schema["items"], item) for item in value]
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, part in schema.get("properties", {}).items():
        if "default" in part and (name not in filled or (filled[name] is None and not part.get("nullable"))):
            filled[name] = copy.deepcopy(part["default"])
        if name in filled:
            filled[name] = with_defaults(part, filled[name])
    if isinstance(schema.get("additionalProperties"), dict):
        extra = schema["additionalProperties"]
        filled |= {name: with_defaults(extra, item) for name, item in value.items()}
    return filled


def violations(schema: Json, value: Any, old: Any = None, path: str = "") -> list[Cause]:
    """What is wrong with the value, by the schema and its CEL rules. ``old`` is what it replaces, if any."""
    if value is None and schema.get("nullable"):
        return []
    wrong = _type_error(schema, value, path)
    if wrong:
        return [wrong]
    found = [*_limits(schema, value, path)]
    if isinstance(value, dict):
        found += _in_object(schema, value, old if isinstance(old, dict) else {}, path)
    elif isinstance(value, list) and "items" in schema:
        found += _in_list(schema, value, path)
    return found or _rule_errors(schema, value, old, path)


def _type_error(schema: Json, value: Any, path: str) -> Cause | None:
    if schema.get("x-kubernetes-int-or-string"):
        fits = isinstance(value, (int, str)) and not isinstance(value, bool)
        name = "integer,string"
    elif "type" in schema:
        name = schema["type"]
        fits = isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
    else:
        return None
    if fits:
        return None
    is_a = _name_of_type(value)
    message = f'Invalid value: "{is_a}": {path} in body must be of type {name}: "{is_a}"'
    return Cause(path, "FieldValueTypeInvalid", message)


def _name_of_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return next(name for name, kinds in _TYPES.items() if isinstance(value, kinds))


def _limits(schema: Json, value: Any, path: str) -> list[Cause]:
    """Violations of enum, pattern, format and the limits of numbers and lengths."""
    found = []

    def add(text: str, reason: str = "FieldValueInvalid") -> None:
        found.append(Cause(path, reason, text))

    shown = f'"{value}"' if isinstance(value, str) else value
    if "enum" in schema and value not in schema["enum"]:
        allowed = ", ".join(f'"{each}"' for each in schema["enum"])
        add(f"Unsupported value: {shown}: supported values: {allowed}", "FieldValueNotSupported")
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            add(f"Invalid value: {shown}: {path} in body should match '{schema['pattern']}'")
        if len(value) < schema.get("minLength", 0):
            add(f"Invalid value: {shown}: {path} in body should be at least {schema['minLength']} chars long")
        if len(value) > schema.get("maxLength", len(value)):
            add(f"Too long: may not be more than {schema['maxLength']} bytes", "FieldValueTooLong")
        if schema.get("format") == "date-time" and not _is_time(value):
            add(f"Invalid value: {shown}: {path} in body must be of type date-time: {shown}")
    if isinstance(value, (int, float)):
        if value < schema.get("minimum", value):
            least = schema["minimum"]
            add(f"Invalid value: {value}: {path} in body should be greater than or equal to {least}")
        bits = _BITS.get(schema.get("format", ""))
        if bits and not -(2**bits) <= value < 2**bits:
            add(f"Invalid value: {value}: {path} in body must be of type {schema['format']}: {shown}")
    if isinstance(value, list) and len(value) < schema.get("minItems", 0):
        add(f"Invalid value: {len(value)}: {path} in body should have at least {schema['minItems']} items")
    return found


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _in_object(schema: Json, value: Json, old: Json, path: str) -> list[Cause]:
    found = [
        Cause(f"{path}.{name}".lstrip("."), "FieldValueRequired", "Required value")
        for name in schema.get("required", [])
        if name not in value
    ]
    extra = schema.get("additionalProperties")
    for name, item in value.items():
        part = schema.get("properties", {}).get(name, extra)
        if isinstance(part, dict) and not (path == "" and name == "metadata"):
            found += violations(part, item, old.get(name), f"{path}.{name}".lstrip("."))
    return found


def _in_list(schema: Json, value: list[Any], path: str) -> list[Cause]:
    found = []
    seen = []
    keys = schema.get("x-kubernetes-list-map-keys", [])
    for index, item in enumerate(value):
        found += violations(schema["items"], item, None, f"{path}[{index}]")
        identity = {key: item.get(key) for key in keys} if isinstance(item, dict) else {}
        if keys and identity in seen:
            shown = ", ".join(f'"{key}":"{each}"' for key, each in identity.items())
            found.append(
                Cause(f"{path}[{index}]", "FieldValueDuplicate", f"Duplicate value: {{{shown}}}"),
            )
        seen.append(identity)
    return found


@cache
def _program(rule: str) -> Any:
    return cel.compile(rule)


def _rule_errors(schema: Json, value: Any, old: Any, path: str) -> list[Cause]:
    """Violations of ``x-kubernetes-validations``. A rule with oldSelf holds for updates alone."""
    found = []
    for each in schema.get("x-kubernetes-validations", []):
        is_transition = "oldSelf" in each["rule"]
        if is_transition and old is None:
            continue
        if not _program(each["rule"]).execute({"self": value, "oldSelf": old}):
            shown = f'"{value}"' if isinstance(value, str) else _name_of_type(value)
            text = f"Invalid value: {shown}: {each.get('message') or each['rule']}"
            found.append(Cause(path, each.get("reason", "FieldValueInvalid"), text))
    return found
