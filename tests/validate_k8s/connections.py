"""Who reaches whom: Services, addresses in settings, network policies, monitors, the route from outside."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.support.alerts_manifest import RULES
from tests.validate_k8s import facts
from tests.validate_k8s.overlay import Overlay, at, title
from tests.validate_k8s.references import pods_with

OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
RAY = {"operator": {8265}, "prometheus": {8080}}
ADMITTED: dict[str, dict[str, set[int]]] = {
    "control": {"anyone": {8080}, "prometheus": {9464}},
    "train": {**RAY, "train": set(), "control": {8265}},
    "align": {**RAY, "align": set(), "control": {8265}},
    "serve": {**RAY, "serve": set(), "control": {8000}, "operator": {8265, 8000}},
    "redis": {"train": {6379}, "serve": {6379}},
    "postgres": {"control": {5432}, "migrate": {5432}},
    "s3": {part: {8333} for part in ("control", "train", "align", "serve", "bucket")},
}
"""The ports to which pods of a part admit connections, by sender; an empty set is every port."""
CLIENTS_ONLY = {"migrate", "bucket"}
"""Parts that nothing connects to: they listen to nothing."""
SERVICES = {
    "dde-control": {"http": 8080, "metrics": 9464},
    "dde-redis": {"redis": 6379},
    "dde-postgres": {"postgres": 5432},
    "dde-s3": {"s3": 8333},
}


def findings(overlay: Overlay) -> Iterator[str]:
    yield from _services(overlay)
    yield from _addresses(overlay)
    yield from _policies(overlay)
    yield from _monitors(overlay)
    yield from _alerts(overlay)
    yield from _routes(overlay)


def _services(overlay: Overlay) -> Iterator[str]:
    for service in overlay.of("Service"):
        name = at(service, "metadata", "name", default="")
        selector = at(service, "spec", "selector")
        pods = pods_with(overlay, selector)
        if len(pods) != 1 or set(at(service, "spec")) != {"selector", "ports"}:
            selected = [pod.title for pod in pods]
            yield f"{title(service)}: it selects {selected}, or has more than a selector and ports"
            continue
        given = {}
        for port in at(service, "spec", "ports", default=[]):
            given[port.get("name")] = port.get("port")
            if pods[0].ports.get(port.get("targetPort")) != port.get("port") or set(port) != {
                "name",
                "port",
                "targetPort",
            }:
                yield f"{title(service)}: port {port} is not one of its pods: {pods[0].ports}"
        if given != SERVICES.get(name):
            yield f"{title(service)}: its ports are {given}, not {SERVICES.get(name)}"
    for owner in overlay.of("StatefulSet"):
        name = at(owner, "spec", "serviceName", default="")
        if name != at(owner, "metadata", "name", default=None) or not overlay.named("Service", name):
            yield f"{title(owner)}: serviceName {name!r} is not its Service"
    for pod in overlay.pods():
        image = facts.image_of(at(pod.own_containers, 0, "image", default=""))
        if image and image.ports is not None and set(pod.ports.values()) != image.ports:
            yield f"{pod.title}: its image listens at {sorted(image.ports)}, not at {pod.ports}"
    control = [pod.ports for pod in overlay.pods() if pod.part == "control"]
    wanted = {"http": overlay.config.get("DDE_PORT"), "metrics": overlay.config.get("DDE_METRICS_PORT")}
    if [{name: str(port) for name, port in ports.items()} for ports in control] != [wanted]:
        yield f"Deployment/dde-control: its ports {control} are not those of dde-config, {wanted}"


def _addresses(overlay: Overlay) -> Iterator[str]:
    """Each address of something in the cluster leads to a Service, ours or one that KubeRay makes."""
    script = facts.secrets_script()
    given = {
        "DDE_RAY_URL": overlay.config.get("DDE_RAY_URL"),
        "DDE_SERVE_URL": overlay.config.get("DDE_SERVE_URL"),
    }
    if overlay.name == "local":
        given |= {"database_url": f"//{script.LOCAL_DATABASE}", "AWS_ENDPOINT_URL": script.LOCAL_ENDPOINT}
    for document in overlay.ray:
        if document["kind"] != "RayJob":
            cluster = (
                document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterConfig"]
            )
            options = at(cluster, "gcsFaultToleranceOptions")
            given[title(document)] = f"//{options.get('redisAddress')}"
            key = at(options, "redisPassword", "valueFrom", "secretKeyRef")
            if at(options, "redisPassword") != {"valueFrom": {"secretKeyRef": key}} or key != {
                "name": "dde-ray-token",
                "key": "redis_password",
            }:
                yield f"{title(document)}: redisPassword is not that of Redis"
    known = _known(overlay)
    for name, url in given.items():
        parts = urlsplit(url or "")
        if (
            known.get(name) != parts.netloc
            or (name.startswith("DDE_") and parts.scheme != "http")
            or parts.path
        ):
            yield f"{name}: {url!r} does not lead to {known.get(name)}"


def _known(overlay: Overlay) -> dict[str, str]:
    """Where each address must lead: KubeRay calls its Services after the document that they belong to."""
    found = {
        "DDE_RAY_URL": ("RayCluster", "dde-train", "dde-train-head-svc:8265"),
        "DDE_SERVE_URL": ("RayService", "dde-serve", "dde-serve-serve-svc:8000"),
        "RayCluster/dde-train": ("Service", "dde-redis", "dde-redis:6379"),
        "RayService/dde-serve": ("Service", "dde-redis", "dde-redis:6379"),
        "database_url": ("Service", "dde-postgres", "dde-postgres:5432"),
        "AWS_ENDPOINT_URL": ("Service", "dde-s3", "dde-s3:8333"),
    }
    return {name: address for name, (kind, owner, address) in found.items() if overlay.named(kind, owner)}


def _policies(overlay: Overlay) -> Iterator[str]:
    parts = {pod.part for pod in overlay.pods()}
    policies = overlay.of("NetworkPolicy")
    selected = [
        at(policy, "spec", "podSelector", "matchLabels", "dde-part", default="") for policy in policies
    ]
    if sorted(selected) != sorted(parts - CLIENTS_ONLY):
        yield f"NetworkPolicies select {sorted(selected)}, but the pods are {sorted(parts - CLIENTS_ONLY)}"
    for policy in policies:
        spec = at(policy, "spec")
        part = at(spec, "podSelector", "matchLabels", "dde-part", default="")
        if spec.get("policyTypes") != ["Ingress"] or spec.get("podSelector") != {
            "matchLabels": {"dde-part": part}
        }:
            yield f"{title(policy)}: podSelector or policyTypes is wrong"
        if at(policy, "metadata", "name", default="") != f"dde-{part}":
            yield f"{title(policy)}: it is not called after its part {part!r}"
        admitted = admitted_by(policy)
        if admitted != ADMITTED.get(part):
            yield f"{title(policy)}: it admits {admitted}, not {ADMITTED.get(part)}"
        ports = {number for pod in overlay.pods() if pod.part == part for number in pod.ports.values()}
        for numbers in admitted.values():
            if not numbers <= ports:
                yield f"{title(policy)}: no pod listens at {sorted(map(str, numbers - ports))}"


def admitted_by(policy: dict) -> dict[str, set]:
    """The ports that a policy opens, by sender: a part, "operator", "prometheus" or "anyone"."""
    found: dict[str, set] = {}
    for rule in at(policy, "spec", "ingress", default=[]):
        ports = {port.get("port") for port in rule.get("ports", []) if set(port) == {"port"}}
        if len(ports) != len(rule.get("ports", [])):
            ports.add("another protocol or a range")
        for sender in rule.get("from", [None]):
            for who in _senders(sender):
                found.setdefault(who, set()).update(ports)
    return found


def _senders(sender: dict | None) -> list[str]:
    if sender is None:
        return ["anyone"]
    labels = at(sender, "podSelector", "matchLabels")
    expressions = at(sender, "podSelector", "matchExpressions", default=[])
    if sender == {"namespaceSelector": {}, "podSelector": {"matchLabels": OPERATOR}}:
        return ["operator"]
    if sender == {"namespaceSelector": {}, "podSelector": {"matchLabels": PROMETHEUS}}:
        return ["prometheus"]
    if sender == {"podSelector": {"matchLabels": {"dde-part": labels.get("dde-part")}}}:
        return [labels["dde-part"]]
    values = at(expressions, 0, "values", default=[])
    listed = {"key": "dde-part", "operator": "In", "values": values}
    if values and sender == {"podSelector": {"matchExpressions": [listed]}}:
        return list(values)
    return [f"unknown sender {sender}"]


def _monitors(overlay: Overlay) -> Iterator[str]:
    """Prometheus finds every pod's metrics by a monitor, and reaches them through the network policies."""
    monitors = overlay.of("ServiceMonitor", "PodMonitor")
    if not monitors:
        return
    watched = set()
    for monitor in monitors:
        yield from _release(overlay, monitor)
        selector = at(monitor, "spec", "selector")
        endpoints = at(monitor, "spec", "endpoints", default=[]) or at(
            monitor, "spec", "podMetricsEndpoints", default=[]
        )
        targets = _targets(overlay, monitor["kind"], selector)
        if not targets:
            yield f"{title(monitor)}: it selects nothing: {selector}"
        for endpoint in endpoints:
            for name, ports in targets.items():
                watched.add(name)
                if endpoint.get("port") != "metrics" or "metrics" not in ports:
                    yield f"{title(monitor)}: {name} has no port {endpoint.get('port')!r} with metrics"
            labels = [label for r in endpoint.get("relabelings", []) for label in r.get("sourceLabels", [])]
            targets_of = [r.get("targetLabel") for r in endpoint.get("relabelings", [])]
            if monitor["kind"] == "PodMonitor" and (labels, targets_of) != (
                ["__meta_kubernetes_pod_label_ray_io_cluster"],
                ["ray_io_cluster"],
            ):
                yield f"{title(monitor)}: metrics are not labelled with the Ray cluster of their pod"
    if watched != {"control", "train", "align", "serve"}:
        yield f"monitors watch {sorted(watched)}, not every part with metrics"


def _release(overlay: Overlay, document: dict) -> Iterator[str]:
    """The operator reads what has the label of its release."""
    release = at(document, "metadata", "labels", "release", default=None)
    if release != overlay.config.get("PROMETHEUS_RELEASE"):
        yield f"{title(document)}: label release {release!r} is not PROMETHEUS_RELEASE"


def _alerts(overlay: Overlay) -> Iterator[str]:
    """The alerts are those of deploy/, which promtool has tested."""
    for document in overlay.of("PrometheusRule"):
        yield from _release(overlay, document)
        if document.get("spec") != RULES:
            yield f"{title(document)}: its alerts are not those of deploy/prometheus/rules.yaml"


def _targets(overlay: Overlay, kind: str, selector: dict) -> dict[str, set[str]]:
    """The parts that a monitor selects, with the names of their ports."""
    labels = dict(selector.get("matchLabels", {}))
    expressions = selector.get("matchExpressions", [])
    found: dict[str, set[str]] = {}
    if kind == "ServiceMonitor":
        for service in overlay.of("Service"):
            if labels and labels.items() <= at(service, "metadata", "labels").items() and not expressions:
                part = at(service, "spec", "selector", "dde-part", default="")
                found[part] = {port.get("name", "") for port in at(service, "spec", "ports", default=[])}
        return found
    for pod in overlay.pods():
        accepts = [
            e["operator"] == "In" and pod.labels.get(e["key"]) in e.get("values", []) for e in expressions
        ]
        if labels.items() <= pod.labels.items() and accepts and all(accepts):
            found[pod.part] = set(pod.ports)
    values = {value for e in expressions for value in e.get("values", [])}
    return {**{value: set() for value in values}, **found}


def _routes(overlay: Overlay) -> Iterator[str]:
    for route in overlay.of("HTTPRoute"):
        host = urlsplit(overlay.config.get("DDE_PUBLIC_URL", "")).hostname
        if at(route, "spec", "hostnames", default=[]) != [host]:
            yield f"{title(route)}: hostnames are not [{host}], that of DDE_PUBLIC_URL"
        parent = {
            "name": overlay.config.get("GATEWAY_NAME"),
            "namespace": overlay.config.get("GATEWAY_NAMESPACE"),
        }
        if at(route, "spec", "parentRefs", default=[]) != [parent]:
            yield f"{title(route)}: parentRefs are not the Gateway of settings.env"
        for rule in at(route, "spec", "rules", default=[]):
            backends = [(b.get("name"), b.get("port")) for b in rule.get("backendRefs", [])]
            if backends != [("dde-control", SERVICES["dde-control"]["http"])] or not overlay.named(
                "Service", "dde-control"
            ):
                yield f"{title(route)}: it leads to {backends}, not to the API of dde-control"
            if any(set(b) != {"name", "port"} for b in rule.get("backendRefs", [])):
                yield f"{title(route)}: backendRefs have more than a name and a port"
            if at(rule, "timeouts", "request", default="") != "660s":
                yield f"{title(route)}: a request may take 600 s (Limits.max_timeout_s); give it 660s"
