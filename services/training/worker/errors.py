"""Why a worker failed, told to the driver where starting it again would end in the same way."""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.distributed

from dde_core.errors import DdeError
from services.api.requests import most_workers
from services.artifacts import checkpoints
from services.errors import Overtaken, ServiceError, Unavailable
from services.stages.runner import failure_of, may_pass
from services.stages.specs import TrainSpec
from services.storage import files

FAILED = "worker-failed.json"
"""In the attempt's folder. Ray Train starts workers again after any error; this ends the run."""
SAME_ERROR_TIMES = 3
"""An error that nobody foresaw comes again for good if it has come so often with no new checkpoint in between."""


def tell(spec: TrainSpec, error: Exception, rank: int, world_size: int) -> None:
    """Write what ended a worker, where that is worth it: our own errors and too little memory at once, others when they repeat.

    What may pass is left to Ray Train: storage, workers that another one lacks, memory that would do if all workers were there.
    """
    if isinstance(error, (Unavailable, Overtaken, torch.distributed.DistError)) or may_pass(error):
        return
    if (
        world_size > 1 and not torch.distributed.is_initialized()
    ):  # Ray has ended the group, since another worker is gone
        return
    if isinstance(error, torch.OutOfMemoryError) and world_size < most_workers(spec.workers):
        return
    is_final = isinstance(error, (DdeError, ServiceError, torch.OutOfMemoryError))
    with suppress(Exception):  # what ended the worker is what its caller is to see
        if is_final or _repeats(spec, error, rank):
            files.write_json(files.join(spec.prefix, FAILED), failure_of(error).model_dump())


def _repeats(spec: TrainSpec, error: Exception, rank: int) -> bool:
    """Count it."""
    uri = files.join(spec.prefix, f"worker-error-{rank}.json")
    said = {"error": failure_of(error).message, "step": max(checkpoints.steps(spec.run), default=0)}
    times = 1
    with suppress(FileNotFoundError):
        before = files.read_json(uri)
        times += before["times"] if said.items() <= before.items() else 0
    files.write_json(uri, said | {"times": times})
    return times >= SAME_ERROR_TIMES
