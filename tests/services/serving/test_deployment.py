"""Serve's options for the deployment, and what a replica counts."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.testclient import TestClient

from dde_core.engine.contract import Turn
from services.serving import metrics, replica
from services.serving.app import ImageServer, ServeArgs, build_app, deployment_options
from services.serving.autoscaling import QueueTime
from services.serving.metrics import Metrics, RayMetrics
from services.serving.routes import install_errors

ROOT = Path(__file__).parents[3]
STORAGE = {"storage_uri": "file:///nowhere"}


def options(**args):
    """The deployment as Serve validated it."""
    return ImageServer.options(**deployment_options(ServeArgs.model_validate({**STORAGE, **args})))


def test_one_replica_is_the_default_and_serve_refuses_with_429_and_a_time():
    deployment = options()
    assert deployment.num_replicas == 1
    backpressure = deployment.backpressure_config
    assert (backpressure.status_code, backpressure.retry_after_s) == (429, 1.0)


def test_serves_own_limits_are_wider_than_admission_which_knows_keys_and_work():
    deployment = options(limits={"max_requests": 10})
    assert deployment.max_ongoing_requests > 10
    assert deployment.max_queued_requests > 0


def test_a_replica_that_stops_has_the_time_of_its_longest_request():
    deployment = options(limits={"max_timeout_s": 1234.0})
    config = deployment._deployment_config
    assert config.graceful_shutdown_timeout_s > 1234.0
    assert config.graceful_shutdown_wait_loop_s <= 1.0


def test_replicas_scale_by_the_time_in_the_queue_between_the_two_numbers():
    deployment = options(min_replicas=2, max_replicas=5, target_queue_s=7.0)
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.policy.policy_kwargs == {"target_s": 7.0}
    policy = scaling.policy.get_policy()
    assert policy.__name__ == QueueTime.__name__


def test_a_fixed_number_of_replicas_does_not_scale():
    deployment = options(min_replicas=3, max_replicas=3)
    assert deployment.num_replicas == 3
    assert deployment._deployment_config.autoscaling_config is None


def test_replicas_may_share_a_gpu_and_need_none_without_use_gpu():
    assert options(use_gpu=True).ray_actor_options["num_gpus"] == 1.0
    assert options(use_gpu=True, gpus_per_replica=0.25).ray_actor_options["num_gpus"] == 0.25
    assert options(gpus_per_replica=0.25).ray_actor_options["num_gpus"] == 0.0


def test_replicas_that_share_a_gpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(replica, "memory_of", lambda device: 80_000)
    halves = [{"gpus_per_replica": part, "use_gpu": True} for part in (1, 0.5)]
    sizes = [replica._half_of_its_memory(ServeArgs(**STORAGE, **args)) for args in [*halves, {}]]
    assert sizes == [40_000, 20_000, 40_000]


def test_storage_is_that_of_the_environment_unless_the_args_name_another(monkeypatch):
    monkeypatch.delenv("DDE_STORAGE_URI", raising=False)
    with pytest.raises(ValidationError, match="storage_uri"):
        ServeArgs.model_validate({})
    monkeypatch.setenv("DDE_STORAGE_URI", "s3://bucket/dde")
    assert ServeArgs.model_validate({}).storage_uri == "s3://bucket/dde"
    assert ServeArgs.model_validate(STORAGE).storage_uri == STORAGE["storage_uri"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"gpus_per_replica": 2}, "gpus_per_replica"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas: must be at least min_replicas"),
        ({"limits": {"max_queued_s": -1}}, "max_queued_s must be positive, got -1"),
        ({"limits": {"max_queue_s": 1}}, "max_queue_s"),
        ({"target_queue_s": 0}, "target_queue_s"),
    ],
)
def test_wrong_settings_are_refused_by_name_before_anything_is_deployed(args, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        build_app({**STORAGE, **args})


def test_the_shipped_config_has_valid_args():
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    for application in config["applications"]:
        ServeArgs.model_validate(application["args"])


def test_an_unexpected_error_of_a_replica_is_in_the_apis_form_so_it_is_not_taken_for_a_death():
    async def fail() -> None:
        raise RuntimeError("boom")

    api = FastAPI()
    install_errors(api)
    api.add_api_route("/fails", fail)
    answer = TestClient(api, raise_server_exceptions=False).get("/fails")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the request failed: RuntimeError"


def names_of_metrics() -> list[str]:
    strings = [
        node.value
        for node in ast.walk(ast.parse(Path(metrics.__file__).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [text for text in strings if text.startswith("dde_serve_")]


def test_every_metric_is_named_by_prometheus_rules_and_documented():
    names = names_of_metrics()
    assert len(names) == len(set(names)) == 9
    text = (ROOT / "docs" / "serving.md").read_text()
    for name in names:
        assert re.fullmatch(r"dde_serve_[a-z_]+_(seconds|bytes|ratio|total)", name), name
        assert f"`ray_{name}`" in text, name


def test_rays_metrics_take_everything_that_a_replica_counts():
    counted: Metrics = RayMetrics()
    counted.waited(0.1)
    counted.turn(Turn(samples=3, rows=6, max_rows=8, seconds=0.2))
    counted.drawn(2)
    counted.loaded(3.0)
    counted.evicted()
    counted.holds(1 << 30)
    counted.refused("queue_full")
    counted.cancelled("deadline")
