"""k8s/overlays/production/alerts.yaml: the alerts of deploy/ as the Prometheus operator reads them.

`make settings` writes it.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RULES_FILE = ROOT / "deploy" / "prometheus" / "rules.yaml"
RULES: dict[str, Any] = yaml.safe_load(RULES_FILE.read_text())
MANIFEST = ROOT / "k8s" / "overlays" / "production" / "alerts.yaml"
HEAD = """\
# Made of deploy/prometheus/rules.yaml by `make settings`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: dde
  namespace: dde
  labels:
    release: from-settings
spec:
"""


def manifest() -> str:
    """The document, with the rules as they stand in their file."""
    rules = RULES_FILE.read_text()
    return HEAD + textwrap.indent(rules[rules.index("groups:") :], "  ")


if __name__ == "__main__":
    MANIFEST.write_text(manifest())
