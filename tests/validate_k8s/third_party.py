"""The fields that k8s/ uses of kinds whose CRDs come from nowhere that a test can reach, closed and typed.

Read in the public API references of Kueue (v1beta2), the Gateway API (v1) and the Prometheus operator (v1).
They prove that a field is spelled as in the reference, not that a controller accepts the document.
"""

from __future__ import annotations

from typing import Any

NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"}
TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kKMGTPE]i?)?$"}
DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}


def fields(*required: str, **properties: Any) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def items(schema: dict, least: int = 1) -> dict:
    return {"type": "array", "items": schema, "minItems": least}


def enum(*values: str) -> dict:
    return {"enum": list(values)}


def document(api_version: str, kind: str, *required: str, **properties: Any) -> dict:
    metadata = fields("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
    head = {"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": metadata}
    return fields("apiVersion", "kind", "metadata", *required, **head, **properties)


TOLERATION = fields(
    key=TEXT,
    operator=enum("Exists", "Equal"),
    value=TEXT,
    effect=enum("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
SELECTOR = fields(
    matchLabels=TEXTS,
    matchExpressions=items(
        fields(
            "key",
            "operator",
            key=TEXT,
            operator=enum("In", "NotIn", "Exists", "DoesNotExist"),
            values=items(TEXT),
        )
    ),
)
RELABELING = fields(sourceLabels=items(TEXT), targetLabel=TEXT, regex=TEXT, action=TEXT, replacement=TEXT)
ENDPOINT = fields("port", port=TEXT, interval=DURATION, path=TEXT, relabelings=items(RELABELING))
ALERT = fields("alert", "expr", alert=TEXT, expr=TEXT, labels=TEXTS, annotations=TEXTS, **{"for": DURATION})
ALERTS = fields("name", "rules", name=TEXT, rules=items(ALERT))
QUOTA = fields("name", "nominalQuota", name=TEXT, nominalQuota=QUANTITY)
FLAVOR = fields("name", "resources", name=NAME, resources=items(QUOTA))
RESOURCES = fields("coveredResources", "flavors", coveredResources=items(TEXT), flavors=items(FLAVOR))
BACKEND = fields(
    "name",
    "port",
    name=NAME,
    port={"type": "integer", "minimum": 1, "maximum": 65_535},
    namespace=NAME,
    weight={"type": "integer"},
)
RULE = fields(
    "backendRefs", backendRefs=items(BACKEND), timeouts=fields(request=DURATION, backendRequest=DURATION)
)
PARENT = fields("name", name=NAME, namespace=NAME, sectionName=NAME)

SCHEMAS = {
    schema["properties"]["kind"]["const"]: schema
    for schema in (
        document(
            "kueue.x-k8s.io/v1beta2",
            "ResourceFlavor",
            spec=fields(nodeLabels=TEXTS, tolerations=items(TOLERATION)),
        ),
        document(
            "kueue.x-k8s.io/v1beta2",
            "ClusterQueue",
            "spec",
            spec=fields(
                "namespaceSelector",  # without one, the queue admits nothing
                "resourceGroups",
                namespaceSelector=SELECTOR,
                queueingStrategy=enum("StrictFIFO", "BestEffortFIFO"),
                resourceGroups=items(RESOURCES),
            ),
        ),
        document(
            "kueue.x-k8s.io/v1beta2",
            "LocalQueue",
            "spec",
            spec=fields("clusterQueue", clusterQueue=NAME),
        ),
        document(
            "kueue.x-k8s.io/v1beta2",
            "WorkloadPriorityClass",
            "value",
            value={"type": "integer"},
            description={"type": "string"},
        ),
        document(
            "gateway.networking.k8s.io/v1",
            "HTTPRoute",
            "spec",
            spec=fields(
                "parentRefs", "rules", parentRefs=items(PARENT), hostnames=items(NAME), rules=items(RULE)
            ),
        ),
        document(
            "monitoring.coreos.com/v1",
            "ServiceMonitor",
            "spec",
            spec=fields("selector", "endpoints", selector=SELECTOR, endpoints=items(ENDPOINT)),
        ),
        document(
            "monitoring.coreos.com/v1",
            "PrometheusRule",
            "spec",
            spec=fields("groups", groups=items(ALERTS)),
        ),
        document(
            "monitoring.coreos.com/v1",
            "PodMonitor",
            "spec",
            spec=fields(
                "selector", "podMetricsEndpoints", selector=SELECTOR, podMetricsEndpoints=items(ENDPOINT)
            ),
        ),
    )
}
