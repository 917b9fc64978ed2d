"""Label and field selectors of list and watch requests."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.support.kube.objects import ApiError, Resource
from tests.support.kube.schema import Json

Matches = Callable[[Json], bool]
_SET = re.compile(r"^(?P<key>\S+)\s+(?P<not>not)?in\s*\((?P<values>[^)]*)\)$")
_EQUAL = re.compile(r"^(?P<key>[^=!\s]+)\s*(?P<not>!)?={1,2}\s*(?P<value>\S*)$")
_EXISTS = re.compile(r"^(?P<not>!)?\s*(?P<key>[^=!\s(),]+)$")


def selected(kind: Resource, labels: str, fields: str) -> Matches:
    """Whether an object matches both selectors. Raises BadRequest for one that cannot be read."""
    tests = [_label_test(each) for each in _parts(labels)]
    tests += [_field_test(kind, each) for each in _parts(fields)]
    return lambda item: all(test(item) for test in tests)


def _parts(selector: str) -> list[str]:
    return [each.strip() for each in re.split(r",(?![^(]*\))", selector) if each.strip()]


def _label_test(text: str) -> Matches:
    def labels(item: Json) -> Json:
        return item["metadata"].get("labels") or {}

    if match := _SET.match(text):
        key = match["key"]
        values = {each.strip() for each in match["values"].split(",")}
        if match["not"]:
            return lambda item: labels(item).get(key) not in values
        return lambda item: labels(item).get(key) in values
    if match := _EQUAL.match(text):
        key = match["key"]
        value = match["value"]
        if match["not"]:
            return lambda item: labels(item).get(key) != value
        return lambda item: labels(item).get(key) == value
    if match := _EXISTS.match(text):
        key = match["key"]
        wanted = not match["not"]
        return lambda item: (key in labels(item)) == wanted
    raise ApiError(400, "BadRequest", f'unable to parse requirement: "{text}"')


def _field_test(kind: Resource, text: str) -> Matches:
    match = _EQUAL.match(text)
    if not match:
        raise ApiError(400, "BadRequest", f'invalid selector: "{text}"; can\'t understand "{text}"')
    name = match["key"]
    if name not in ("metadata.name", "metadata.namespace", *kind.fields):
        raise ApiError(400, "BadRequest", f'field label not supported: "{name}"')

    def value(item: Json) -> str:
        found = item
        for part in name.split("."):
            found = found.get(part) or {}
        return str(found or "")

    return lambda item: (value(item) == match["value"]) != bool(match["not"])
