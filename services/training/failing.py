"""Why a worker failed, told to the driver where starting it again would end in the same way."""

from __future__ import annotations

from contextlib import suppress

import torch

from dde_core.errors import DdeError
from services import checkpoints, storage
from services.contracts import TrainSpec, most_workers
from services.errors import Overtaken, ServiceError, Unavailable
from services.stage import failure_of, may_pass

FAILED = "worker-failed.json"
"""In the attempt's folder. Ray Train starts workers again after any error; this ends the run."""
SAME_ERROR_TIMES = 3
"""An error that nobody foresaw comes again for good if it has come so often with no new checkpoint in between."""


def tell(spec: TrainSpec, error: Exception, rank: int, world_size: int) -> None:
    """Write what ended a worker, where that is worth it: our own errors and too little memory at once, others when they repeat.

    What may pass is left to Ray Train, and so is memory that does not suffice for fewer workers than there may be.
    """
    if isinstance(error, (Unavailable, Overtaken)) or may_pass(error):
        return
    if isinstance(error, torch.OutOfMemoryError):
        is_final = world_size == most_workers(spec.workers)
    else:
        is_final = isinstance(error, (DdeError, ServiceError))
    with suppress(OSError, Unavailable):
        if is_final or _repeats(spec, error, rank):
            storage.write_json(storage.join(spec.prefix, FAILED), failure_of(error).model_dump())


def _repeats(spec: TrainSpec, error: Exception, rank: int) -> bool:
    """Count it. A rank whose peers have died says so each time with another address."""
    uri = storage.join(spec.prefix, f"worker-error-{rank}.json")
    said = {"error": failure_of(error).message, "step": max(checkpoints.steps(spec.run), default=0)}
    times = 1
    with suppress(FileNotFoundError):
        before = storage.read_json(uri)
        times += before["times"] if said.items() <= before.items() else 0
    storage.write_json(uri, said | {"times": times})
    return times >= SAME_ERROR_TIMES
