"""Reports a worker's error to the driver if a restart of the workers would end in the same error.

Ray Train restarts workers after any error. The driver ends the run as soon as ``worker-failed.json`` exists.
"""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.distributed

from services.api.requests import most_workers
from services.artifacts import checkpoints
from services.errors import Overtaken, Unavailable
from services.stages import layout
from services.stages.runner import failure_of, is_transient, recurs
from services.stages.specs import TrainSpec
from services.storage import files

SAME_ERROR_TIMES = 3
"""An unforeseen error is final after so many times without a new checkpoint in between."""


def report(spec: TrainSpec, error: Exception, rank: int, world_size: int) -> None:
    """Write worker-failed.json if ``error`` is final: ours, too little memory, or any other that repeats."""
    if _is_transient(spec, error, world_size):
        return
    is_final = recurs(error) or isinstance(error, torch.OutOfMemoryError)
    with suppress(Exception):  # the caller must see the worker's error, not one of ours
        if is_final or _count(spec, error, rank) >= SAME_ERROR_TIMES:
            files.write_json(layout.worker_failed_uri(spec.prefix), failure_of(error).model_dump())


def _is_transient(spec: TrainSpec, error: Exception, world_size: int) -> bool:
    """Whether new workers may succeed where this one failed."""
    if isinstance(error, (Unavailable, Overtaken, torch.distributed.DistError)) or is_transient(error):
        return True
    if world_size > 1 and not torch.distributed.is_initialized():
        return True  # another worker died, and Ray has closed the process group
    return isinstance(error, torch.OutOfMemoryError) and world_size < most_workers(spec.workers)


def _count(spec: TrainSpec, error: Exception, rank: int) -> int:
    """Store and return how often this worker has had the same error since the newest checkpoint."""
    uri = layout.worker_error_uri(spec.prefix, rank)
    failure = {"error": failure_of(error).message, "step": max(checkpoints.steps(spec.run), default=0)}
    times = 1
    with suppress(FileNotFoundError):
        previous = files.read_json(uri)
        if failure.items() <= previous.items():
            times += previous["times"]
    files.write_json(uri, failure | {"times": times})
    return times
