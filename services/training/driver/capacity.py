"""What workers take of a cluster, and whether that is there."""

from __future__ import annotations

from collections.abc import Mapping

from services.stages.specs import TrainSpec

CPUS_PER_WORKER = 1


def needs(spec: TrainSpec, workers: int = 1) -> dict[str, float]:
    """Of so many workers. A validation takes what one worker takes."""
    return {"CPU": float(workers * CPUS_PER_WORKER), "GPU": float(workers if spec.use_gpu else 0)}


def lacking(needed: Mapping[str, float], there: Mapping[str, float]) -> str | None:
    """The first kind of which there is too little, or None."""
    return next((name for name, amount in needed.items() if amount > there.get(name, 0.0)), None)
