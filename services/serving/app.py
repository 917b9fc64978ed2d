"""The Serve application: images and scores over HTTP.

Names of models are looked up in storage, so a new model needs no redeployment.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig

from services.serving.args import ServeArgs
from services.serving.autoscaling import QUEUED_S

SHUTDOWN_MARGIN_S = 10.0
"""How much longer than its longest request a replica may take to end."""


@serve.deployment
@serve.ingress()
class ImageServer:
    """A replica of the application."""

    async def __init__(self, args: ServeArgs) -> None:  # type: ignore[misc]
        from services.serving.metrics import RayMetrics
        from services.serving.replica import Replica  # only replicas load torch

        self._replica = Replica(args, RayMetrics())
        await self._replica.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return self._replica.api()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: what ``services.serving.autoscaling.QueueTime`` reads."""
        return {QUEUED_S: self._replica.admission.queued_s()}


def build_app(args: dict[str, Any]) -> Application:
    """The application, not started. ``args`` come from the Serve config; ``ServeArgs`` lists them."""
    parsed = ServeArgs.model_validate(args)
    return ImageServer.options(**deployment_options(parsed)).bind(parsed)  # type: ignore[attr-defined]


def deployment_options(args: ServeArgs) -> dict[str, Any]:
    """Serve's options for the deployment.

    Serve's own limits are wider than ``Admission``, which knows keys and work, so they are the second line.
    A replica that stops gets no new requests, and has the time of its longest one to finish what it has.
    """
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": args.num_gpus},
        "max_ongoing_requests": 2 * args.limits.max_requests,
        "max_queued_requests": args.limits.max_requests,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": args.limits.max_timeout_s + SHUTDOWN_MARGIN_S,
    }
    if args.max_replicas == args.min_replicas:
        return {**options, "num_replicas": args.min_replicas}
    policy = AutoscalingPolicy(
        policy_function="services.serving.autoscaling:QueueTime",
        policy_kwargs={"target_s": args.target_queue_s},
    )
    autoscaling = AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        policy=policy,
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
    )
    return {**options, "autoscaling_config": autoscaling}
