"""The alerts fire when they must and at no other time; every metric that they and the dashboard read exists.

promtool (Debian's package prometheus) evaluates the expressions.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from starlette.testclient import TestClient

from services.control.app import build_app
from services.settings import Settings
from tests.services.control.fakes import FakeLauncher
from tests.support.alert_cases import CASES, promtool_tests
from tests.support.alerts_manifest import MANIFEST, RULES, RULES_FILE, manifest

ROOT = Path(__file__).parents[1]
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RUNBOOK = ROOT / "docs" / "runbook.md"

FUNCTIONS = {"absent", "histogram_quantile", "increase", "max", "min", "rate", "sum", "time", "vector"}
OPERATORS = {"and", "by", "offset", "or"}
"""The words of PromQL in our expressions; others are metrics."""
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
"""What Prometheus reads of a metric of each type, after the metric's name."""

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)"
)


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=240)


# ---- alerts


@needs_promtool
def test_every_alert_fires_in_its_case_and_is_silent_in_its_counter_cases(tmp_path: Path):
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump(promtool_tests(RULES, str(RULES_FILE)), sort_keys=False))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("alert", ["DdeApiErrors", "DdeServeDown", "DdeCheckpointOld"])
def test_a_rule_that_always_fires_and_one_that_never_does_are_caught(alert: str, tmp_path: Path):
    for expression, caught in (("vector(1)", "is silent"), ("vector(1) > 2", "fires")):
        spoiled = json.loads(json.dumps(RULES))
        for rule in (rule for group in spoiled["groups"] for rule in group["rules"]):
            if rule["alert"] == alert:
                rule["expr"] = expression
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spoiled))
        file = tmp_path / "tests.yaml"
        file.write_text(yaml.safe_dump(promtool_tests(spoiled, "rules.yaml", [alert])))
        done = promtool("test", "rules", file)
        assert done.returncode != 0
        assert f"{alert} {caught}" in done.stdout + done.stderr


def test_the_alerts_of_the_production_overlay_are_these():
    assert MANIFEST.read_text() == manifest(), "run `make settings`"


def test_every_alert_has_a_case_with_a_counter_case():
    assert set(CASES) == set(ALERTS)
    assert all(case.silent for case in CASES.values())


def test_every_alert_has_a_severity_and_its_section_of_the_runbook():
    sections = re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sections == list(ALERTS), "one section for each alert, in the order of the rules"
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"


def test_every_section_of_an_alert_says_what_it_means_and_what_to_do():
    text = RUNBOOK.read_text()
    for name in ALERTS:
        section = text.split(f"### {name}\n", 1)[1].split("\n#", 1)[0]
        assert "**Means**" in section, name
        assert "**Do**" in section, name


# ---- dashboard


def test_the_dashboard_has_panels_that_do_not_overlap_and_explain_themselves():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in PANELS:
        assert panel["title"].endswith("?"), "a panel answers a question"
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCD")[: len(panel["targets"])]


def test_every_panel_reads_the_source_that_the_dashboard_lets_one_choose():
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert all(each["datasource"] == source for panel in PANELS for each in [panel, *panel["targets"]])


@needs_promtool
def test_every_expression_of_the_dashboard_parses(tmp_path: Path):
    rules = [
        {"record": f"panel:{panel['id']}:{target['refId']}", "expr": as_promql(target["expr"])}
        for panel in PANELS
        for target in panel["targets"]
    ]
    file = tmp_path / "rules.yaml"
    for extra, parses in ([], True), ([{"record": "broken", "expr": "sum(rate(x[5m])"}], False):
        file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": [*rules, *extra]}]}))
        done = promtool("check", "rules", file)
        assert (done.returncode == 0) is parses, done.stdout + done.stderr


def as_promql(expression: str) -> str:
    """An expression with a value in place of Grafana's variable."""
    return expression.replace("$__rate_interval", "5m")


# ---- metrics


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in ALERTS.values())
    yield from (as_promql(target["expr"]) for panel in PANELS for target in panel["targets"])


def metrics_of(expression: str) -> set[str]:
    """The metrics that an expression reads."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on) \([^)]*\)|\boffset \w+", " ", bare)
    return set(re.findall(r"\b[a-zA-Z_]\w*", bare)) - FUNCTIONS - OPERATORS


def control_metrics(folder: Path) -> set[str]:
    """What the text of a control plane that has answered a request names."""
    settings = Settings(
        api_key=SecretStr("-"), storage_uri=str(folder), database_url=f"sqlite:///{folder}/dde.db"
    )
    with TestClient(build_app(settings, FakeLauncher(), reconcile=False)) as http:
        assert http.get("/v1/models", headers={"authorization": "Bearer -"}).status_code == 200
        text = http.get("/metrics").text
    families = [each for each in text_string_to_metric_families(text) if each.name.startswith("dde_")]
    return {f"{each.name}{suffix}" for each in families for suffix in SUFFIXES[each.type]}


@cache
def serve_metrics() -> set[str]:
    """What a replica defines, under the names that Ray exports."""
    tree = ast.parse((ROOT / "services" / "serving" / "metrics.py").read_text())
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    kinds = {"Counter", "Gauge", "Histogram"}
    defined = {ast.literal_eval(call.args[0]): call.func.id for call in calls if call.func.id in kinds}  # type: ignore[attr-defined]
    return {
        f"ray_{name.removesuffix('_total')}{suffix}"
        for name, kind in defined.items()
        for suffix in SUFFIXES[kind.lower()]
    }


@cache
def ray_metrics() -> set[str]:
    """What Ray's nodes and Serve's controller define, by the first argument of each gauge."""
    found: set[str] = set()
    for module in ("ray.dashboard.modules.reporter.reporter_agent", "ray.serve._private.deployment_state"):
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Gauge":
                found.add(f"ray_{ast.literal_eval(node.args[0])}")
    return found


def test_every_metric_that_is_read_exists(tmp_path: Path):
    known = control_metrics(tmp_path) | serve_metrics() | ray_metrics()
    read = {metric for expression in expressions() for metric in metrics_of(expression)}
    assert read - known == set()


def test_every_metric_of_a_replica_is_on_the_dashboard(tmp_path: Path):
    """The counts and sums of histograms are read where a mean or a rate is shown."""
    read = {metric for target in expressions() for metric in metrics_of(target)}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in serve_metrics()}
    assert {name for name in families if not any(metric.startswith(name) for metric in read)} == set()


@pytest.mark.parametrize(
    ("expression", "metrics"),
    [
        ('sum by (a, b) (rate(x_total{c=~"y|z"}[5m])) > 3', {"x_total"}),
        ("time() - max(made_up_seconds offset 1h)", {"made_up_seconds"}),
        ("histogram_quantile(0.9, sum by (le) (rate(h_bucket[5m]))) and absent(up == 1)", {"h_bucket", "up"}),
    ],
)
def test_the_metrics_of_an_expression_are_found(expression: str, metrics: set[str]):
    assert metrics_of(expression) == metrics
