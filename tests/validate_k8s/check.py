"""All checks of an overlay."""

from __future__ import annotations

from collections.abc import Iterator

from tests.validate_k8s import (
    capacity,
    connections,
    containers,
    control,
    kuberay,
    references,
    schemas,
    security,
    serve,
)
from tests.validate_k8s.overlay import Overlay, title

RULES = {
    "Pod Security and resources": security.findings,
    "KubeRay's rules": kuberay.findings,
    "references": references.findings,
    "containers": containers.findings,
    "connections": connections.findings,
    "the control plane": control.findings,
    "sizes, queue, quotas": capacity.findings,
    "Serve": serve.findings,
}


def findings(overlay: Overlay) -> Iterator[str]:
    """What is wrong with the overlay. The rules read only documents that fit their schemas."""
    refused = [f"{title(d)}: {refusal}" for d in overlay.documents for refusal in schemas.refusals(d)]
    if refused:
        yield from refused
        return
    for rule in RULES.values():
        yield from rule(overlay)


def is_caught(overlay: Overlay, changed: dict) -> bool:
    """Whether anything is wrong after one document changed."""
    if not schemas.is_accepted(changed):
        return True
    return any(next(iter(rule(overlay)), None) is not None for rule in RULES.values())
