"""Does the validator notice a mistake?

Every field misspelt, every field removed, every value changed, one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tests.validate_k8s.check import is_caught
from tests.validate_k8s.overlay import Overlay, title

What = Literal["misspelt", "removed", "reference", "value"]
WORDS: dict[What, str] = {
    "misspelt": "field names misspelt",
    "removed": "fields removed",
    "reference": "references changed",
    "value": "other values changed",
}
REFERENCES = re.compile(
    r"""
    (^|\.)image$ | [pP]orts?\.\d+\.(name|containerPort|port|targetPort)$ | \.port$ | \.targetPort$
    | (^|\.)(command|args)(\.|$) | \.env\.\d+\.(name|value)$ | Ref\.(name|key|kind|apiGroup|apiVersion)$
    | (configMap|secret)\.(name|secretName)$ | items\.\d+\.(key|path)$ | secretName$
    | serviceAccountName$ | matchLabels\. | matchExpressions\. | ^spec\.selector\. | \.labels\.
    | ^metadata\.(name|labels|namespace) | ^data\. | ^subjects\. | ^roleRef\. | ^rules\.
    | \.volumes\.\d+\.name$ | volumeClaimTemplates\.\d+\.metadata | volumeMounts\.\d+\.(name|mountPath)$
    | clusterQueue$ | serviceName$ | ^imagePullSecrets | nodeSelector\. | nodeLabels\.
    | tolerations\.\d+\.(key|value)$ | topologyKey$ | backendRefs | parentRefs | hostnames | scaleTargetRef
    | flavors\.\d+\.name$ | resources\.\d+\.name$ | coveredResources | redisAddress | rayVersion$
    | httpGet\.path$ | ^applications\. | ^spec\.hard\. | sourceLabels | rayStartParams\. | groupName$
    """,
    re.VERBOSE,
)
"""The paths of values that stand for something elsewhere."""
AMOUNTS = re.compile(r"^data\.(?!.*PORT$)|^applications\.\d+\.args|^spec\.hard\.")
"""Where a number is an amount and stands for nothing."""
WRITTEN_ELSEWHERE = {
    "ConfigMap": re.compile(r"^data\.rayjob\.yaml$"),  # a document of its own here: RayJob
    "RayService": re.compile(r"^spec\.serveConfigV2$"),  # the same: ServeConfig
    "RayJob": re.compile(
        r"^(?!spec\.rayClusterSpec|spec\.ttl|kind$|apiVersion$).|\.(minReplicas|maxReplicas|replicas)$|\.labels\.dde-run$"
    ),
    "ServeConfig": re.compile(r"^kind$"),
}
"""Values whose text is a document that is checked on its own, and what the control plane fills in."""

Apply = Callable[[], Callable[[], None]]
"""Makes the change; what it returns undoes it."""


@dataclass
class Mutation:
    document: dict
    path: str
    what: What
    apply: Apply

    def __str__(self) -> str:
        return f"{title(self.document)}: {self.path}: {self.what}"


@dataclass
class Result:
    made: dict[What, int]
    caught: dict[What, int]
    uncaught: list[str]


def mutations(overlay: Overlay) -> Iterator[Mutation]:
    for document in overlay.documents:
        skip = WRITTEN_ELSEWHERE.get(document["kind"])
        for parent, key, path in list(_walk(document, "")):
            if skip and skip.search(path):
                continue
            if isinstance(key, str):
                yield Mutation(document, path, "misspelt", _renamer(parent, key))
            yield Mutation(document, path, "removed", _remover(parent, key))
            value = parent[key]
            if not isinstance(value, (dict, list)):
                is_number = isinstance(value, (int, float)) or re.fullmatch(r"[\d.]+([KMGT]i?)?", value)
                is_amount = is_number and AMOUNTS.search(path)
                what: What = "reference" if REFERENCES.search(path) and not is_amount else "value"
                yield Mutation(document, path, what, _setter(parent, key, changed(value)))


def run(overlay: Overlay, chosen: Callable[[int], bool] = lambda index: True) -> Result:
    """Try the mutations whose index is chosen."""
    result = Result({}, {}, [])
    for index, mutation in enumerate(mutations(overlay)):
        if not chosen(index):
            continue
        name = str(mutation)
        undo = mutation.apply()
        try:
            caught = is_caught(overlay, mutation.document)
        finally:
            undo()
        result.made[mutation.what] = result.made.get(mutation.what, 0) + 1
        result.caught[mutation.what] = result.caught.get(mutation.what, 0) + caught
        if not caught:
            result.uncaught.append(name)
    return result


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if re.fullmatch(r"\d+", str(value)):
        return str(int(value) + 1)
    return f"{value}x"


def _walk(value: Any, prefix: str) -> Iterator[tuple[Any, Any, str]]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        path = f"{prefix}.{key}" if prefix else str(key)
        yield value, key, path
        if isinstance(value[key], (dict, list)):
            yield from _walk(value[key], path)


def _renamer(parent: dict, key: str) -> Apply:
    def apply() -> Callable[[], None]:
        before = dict(parent)
        parent[key + key[-1]] = parent.pop(key)
        return _restorer(parent, before)

    return apply


def _remover(parent: Any, key: Any) -> Apply:
    def apply() -> Callable[[], None]:
        before = parent.copy()
        del parent[key]
        return _restorer(parent, before)

    return apply


def _setter(parent: Any, key: Any, value: Any) -> Apply:
    def apply() -> Callable[[], None]:
        before = parent.copy()
        parent[key] = value
        return _restorer(parent, before)

    return apply


def _restorer(parent: Any, before: Any) -> Callable[[], None]:
    def undo() -> None:
        parent.clear()
        if isinstance(parent, dict):
            parent.update(before)
        else:
            parent.extend(before)

    return undo
