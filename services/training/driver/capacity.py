"""The resources that workers need, and whether a cluster has them."""

from __future__ import annotations

from collections.abc import Mapping

from services.stages.specs import TrainSpec

CPUS_PER_WORKER = 1


def needed(spec: TrainSpec, workers: int = 1) -> dict[str, float]:
    """Ray resources of so many workers. A validation task needs as much as one worker."""
    return {"CPU": float(workers * CPUS_PER_WORKER), "GPU": float(workers if spec.use_gpu else 0)}


def rollout_actors(spec: TrainSpec) -> int:
    """How many actors draw and score beside the workers; each needs as much as one."""
    return spec.rollouts.actors + spec.rollouts.reward_actors if spec.rollouts else 0


def missing(needs: Mapping[str, float], available: Mapping[str, float]) -> str | None:
    """The first resource of which too little is available, or None if all of them suffice."""
    return next((name for name, amount in needs.items() if amount > available.get(name, 0.0)), None)
