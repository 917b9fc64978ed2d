"""Processes of torch.distributed that start by a fork of one process, which has imported the modules once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

IMPORTED = ["tests.core.test_parallel", "tests.services.training.test_batches"]
"""Where the functions of the ranks are."""


def run_ranks(function: Callable[..., None], args: tuple[Any, ...], count: int) -> None:
    """Call ``function(rank, *args)`` in ``count`` processes. Raises what torch does if one of them fails."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    start_processes(function, args, nprocs=count, start_method="forkserver")
