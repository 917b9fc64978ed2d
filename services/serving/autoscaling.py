"""How many replicas there should be: as many as bring the time in the queue to a target.

Serve pickles this module into its controller by value, so it imports nothing of the project.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

QUEUED_S = "queued_s"
"""The statistic of each replica that ``QueueTime`` reads: seconds of work that it has accepted."""


class Context(Protocol):
    """What is read of ``ray.serve.config.AutoscalingContext``."""

    aggregated_metrics: dict[str, dict[Any, float]] | None
    current_num_replicas: int
    target_num_replicas: int


class QueueTime:
    """Serve's autoscaling policy: the seconds queued at all replicas, over ``target_s`` for each.

    Serve averages the statistic over ``look_back_period_s``, keeps the number between ``min_replicas`` and
    ``max_replicas``, and applies its delays.
    """

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """The wanted number of replicas, and no state. Without statistics the number stays."""
        queued_s = (context.aggregated_metrics or {}).get(QUEUED_S)
        if not queued_s:
            return context.target_num_replicas, {}
        mean_s = math.fsum(queued_s.values()) / len(queued_s)
        return max(1, math.ceil(mean_s * context.current_num_replicas / self._target_s)), {}
