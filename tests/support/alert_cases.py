"""For every alert of deploy/prometheus/rules.yaml: series on which it fires, and on which it is silent.

Series are in promtool's notation, one value a minute: ``0+60x30`` is 0, 60, ... 1800.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Series = dict[str, str]


@dataclass(frozen=True)
class AlertCase:
    """``fires`` at minute ``at`` with ``labels`` and ``summary``; ``silent`` at the same minute, each."""

    fires: Series
    summary: str
    silent: tuple[Series, ...]
    labels: dict[str, str] = field(default_factory=dict)
    at: int = 30


UP = {'dde_part_up{part="database"}': "1x60"}
OK = 'dde_http_requests_total{method="GET",route="/v1/models",status="200"}'
BAD = 'dde_http_requests_total{method="GET",route="/v1/models",status="500"}'
READY_503 = 'dde_http_requests_total{method="GET",route="/readyz",status="503"}'
REVIEW = "dde_reconciler_last_review_timestamp_seconds"
STEP = 'dde_training_last_step_timestamp_seconds{job_id="ajob_1",instance="%s"}'
STORED = 'dde_training_last_checkpoint_timestamp_seconds{job_id="ajob_1"}'
HEALTHY = 'ray_serve_deployment_replica_healthy{application="dde",deployment="Images",replica="a"}'
WAITED = "ray_dde_serve_queue_seconds"
FILL = "ray_dde_serve_batch_fill_ratio"
REFUSED = 'ray_dde_serve_refused_total{code="%s"}'
LATE = 'ray_dde_serve_cancelled_total{reason="%s"}'
EVICTED = 'ray_dde_serve_model_evictions_total{replica="a"}'
LOADED = 'ray_dde_serve_model_load_seconds_count{replica="a"}'
NODE = '{instance="n1:8080"}'
GPU = '{instance="n1:8080",GpuIndex="0"}'


def latency(method: str, route: str, below: str, count: str) -> Series:
    """A histogram of requests that all take as long as the bucket ``below``."""
    buckets = ("0.5", "2.5", "5", "+Inf")
    name = f'dde_http_request_seconds_bucket{{method="{method}",route="{route}",le="%s"}}'
    return {name % each: count if buckets.index(each) >= buckets.index(below) else "0x60" for each in buckets}


def waits(below: str, count: str) -> Series:
    """A histogram of requests for images that all wait as long as the bucket ``below``."""
    buckets = ("1", "10", "60", "+Inf")
    values = [count if i >= buckets.index(below) else "0x60" for i in range(len(buckets))]
    found = {f'{WAITED}_bucket{{le="{each}"}}': of for each, of in zip(buckets, values, strict=True)}
    return {**found, f"{WAITED}_count": count}


CASES: dict[str, AlertCase] = {
    "DdeControlDown": AlertCase(
        fires={"up": "0x60"}, summary="No control plane answers Prometheus.", silent=(UP,)
    ),
    "DdePartAway": AlertCase(
        fires={
            'dde_part_up{part="storage",instance="a"}': "0x60",
            'dde_part_up{part="storage",instance="b"}': "1x60",
            'dde_part_up{part="ray",instance="a"}': "1x60",
        },
        labels={"part": "storage"},
        summary="The control plane cannot reach its storage.",
        silent=(UP, {'dde_part_up{part="ray"}': "1x24 0x3 1x30"}),
    ),
    "DdeApiErrors": AlertCase(
        fires={OK: "0+57x60", BAD: "0+3x60"},
        summary="5% of API requests are answered with a 5xx.",
        silent=({OK: "0+59.9x60", BAD: "0+0.1x60"}, {OK: "0+60x60", READY_503: "0+60x60"}, UP),
    ),
    "DdeApiSlow": AlertCase(
        fires=latency("GET", "/v1/models", "5", "0+60x60"),
        summary="The slowest hundredth of reads takes 4.975s or more.",
        silent=(
            latency("GET", "/v1/models", "2.5", "0+60x60"),
            latency("GET", "/v1/alignment/jobs/{job_id}/events", "+Inf", "0+60x60"),
            latency("POST", "/v1/images/generations", "+Inf", "0+60x60"),
        ),
    ),
    "DdeReconcilerStuck": AlertCase(
        fires={f'{REVIEW}{{instance="a"}}': "600x60", f'{REVIEW}{{instance="b"}}': "0x60"},
        summary="No replica has reviewed jobs for 20m 0s.",
        silent=({f'{REVIEW}{{instance="a"}}': "0x60", f'{REVIEW}{{instance="b"}}': "0+60x60"}, UP),
    ),
    "DdeJobsWaitLong": AlertCase(
        fires={"dde_jobs_oldest_wait_seconds": "28800x60"},
        summary="A job has waited 8h 0m 0s for room.",
        silent=({"dde_jobs_oldest_wait_seconds": "7200x60"}, UP),
    ),
    "DdeJobsWithoutCluster": AlertCase(
        fires={'dde_jobs_waiting{reason="cluster_unreachable"}': "2x60"},
        summary="2 jobs run on a Ray cluster that does not answer.",
        silent=({'dde_jobs_waiting{reason="slots"}': "9x60"}, UP),
    ),
    "DdeJobsFailing": AlertCase(
        fires={
            'dde_jobs{kind="alignment",status="failed",instance="a"}': "1x40 5x60",
            'dde_jobs{kind="alignment",status="failed",instance="b"}': "1x40 5x60",
            'dde_jobs{kind="evaluation",status="succeeded",instance="a"}': "1x40 90x60",
        },
        at=80,
        summary="4 jobs have failed within an hour.",
        silent=(
            {'dde_jobs{kind="alignment",status="failed"}': "5x100"},
            {'dde_jobs{kind="alignment",status="failed"}': "1x40 3x60"},
            UP,
        ),
    ),
    "DdeTrainingStalled": AlertCase(
        fires={STEP % "a": "600x90", STEP % "b": "600x90"},
        at=60,
        labels={"job_id": "ajob_1"},
        summary="The training of ajob_1 has logged no step for 50m 0s.",
        silent=({STEP % "a": "0+60x90"}, UP),
    ),
    "DdeCheckpointOld": AlertCase(
        fires={STORED: "600x300"},
        at=190,
        labels={"job_id": "ajob_1"},
        summary="The newest checkpoint of ajob_1 is 3h 0m 0s old.",
        silent=({STORED: "6000x300"}, {STORED: "600x100"}, UP),
    ),
    "DdeServeDown": AlertCase(
        fires={HEALTHY: "0x60"},
        summary="No replica draws images.",
        silent=({HEALTHY: "1x60"}, {HEALTHY: "2x60"}),
    ),
    "DdeServeReplicaUnhealthy": AlertCase(
        fires={HEALTHY: "0x60", HEALTHY.replace('"a"', '"b"'): "1x60"},
        labels={"application": "dde", "deployment": "Images", "replica": "a"},
        summary="Replica a fails its health check.",
        silent=({HEALTHY: "1x60"}, {HEALTHY.replace("dde", "other"): "0x60"}),
    ),
    "DdeServeQueueSlow": AlertCase(
        fires=waits("60", "0+60x60"),
        summary="One request for images in twenty waits 57.5s or more.",
        silent=(waits("10", "0+60x60"), UP),
    ),
    "DdeServeRefuses": AlertCase(
        fires={**waits("1", "0+60x60"), REFUSED % "queue_full": "0+10x60", REFUSED % "key_limit": "0+10x60"},
        summary="25% of requests for images get a 429.",
        silent=(
            {**waits("1", "0+60x60"), REFUSED % "queue_full": "0+1x60"},
            {**waits("1", "0+60x60"), REFUSED % "too_much_work": "0+60x60"},
            UP,
        ),
    ),
    "DdeServeMissesDeadlines": AlertCase(
        fires={**waits("60", "0+60x60"), LATE % "deadline": "0+6x60"},
        summary="10% of accepted requests are not done in time.",
        silent=({**waits("1", "0+60x60"), LATE % "disconnected": "0+30x60"}, UP),
    ),
    "DdeServeBatchesEmpty": AlertCase(
        fires={**waits("60", "0+60x60"), f"{FILL}_sum": "0+6x60", f"{FILL}_count": "0+60x60"},
        summary="Requests queue although U-Net calls are filled to 10%.",
        silent=(
            {**waits("60", "0+60x60"), f"{FILL}_sum": "0+48x60", f"{FILL}_count": "0+60x60"},
            {**waits("1", "0+60x60"), f"{FILL}_sum": "0+6x60", f"{FILL}_count": "0+60x60"},
        ),
    ),
    "DdeServeThrashes": AlertCase(
        fires={EVICTED: "0+2x60", LOADED: "0+2x60"},
        labels={"replica": "a"},
        summary="Replica a evicts and loads models again and again.",
        silent=({EVICTED: "0+0.2x60", LOADED: "0+0.2x60"}, {EVICTED: "0x60", LOADED: "0+2x60"}),
    ),
    "DdeGpuMemoryFull": AlertCase(
        fires={f"ray_node_gram_used{GPU}": "78x60", f"ray_node_gram_available{GPU}": "2x60"},
        labels={"instance": "n1:8080", "GpuIndex": "0"},
        summary="GPU 0 of n1:8080 has 97.5% of its memory in use.",
        silent=({f"ray_node_gram_used{GPU}": "60x60", f"ray_node_gram_available{GPU}": "20x60"}, UP),
    ),
    "DdeNodeMemoryFull": AlertCase(
        fires={f"ray_node_mem_used{NODE}": "95x60", f"ray_node_mem_total{NODE}": "100x60"},
        labels={"instance": "n1:8080"},
        summary="n1:8080 has 95% of its memory in use.",
        silent=({f"ray_node_mem_used{NODE}": "80x60", f"ray_node_mem_total{NODE}": "100x60"}, UP),
    ),
    "DdeNodeDiskFull": AlertCase(
        fires={f"ray_node_disk_utilization_percentage{NODE}": "95x60"},
        labels={"instance": "n1:8080"},
        summary="The disk of n1:8080 is 95% full.",
        silent=({f"ray_node_disk_utilization_percentage{NODE}": "60x60"}, UP),
    ),
}


def promtool_tests(rules: dict[str, Any], rules_file: str, names: Iterable[str] = CASES) -> dict[str, Any]:
    """The cases of these alerts as promtool's unit tests of ``rules``, the content of ``rules_file``."""
    alerts = {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"]}
    tests = []
    for name in names:
        case = CASES[name]
        rule = alerts[name]
        annotations = {"summary": case.summary, "runbook": rule["annotations"]["runbook"]}
        fired = {"exp_labels": {**rule["labels"], **case.labels}, "exp_annotations": annotations}
        tests.append(_test(f"{name} fires", case.fires, case.at, name, [fired]))
        for number, series in enumerate(case.silent):
            tests.append(_test(f"{name} is silent {number}", series, case.at, name, []))
    return {"rule_files": [rules_file], "evaluation_interval": "1m", "tests": tests}


def _test(name: str, series: Series, at: int, alert: str, expected: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "alert_rule_test": [{"eval_time": f"{at}m", "alertname": alert, "exp_alerts": expected}],
    }
