"""Why training leaves its workers before it is done: it was asked to stop, or a node goes or comes. All of them agree."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import ray
import ray.train
import torch

from services.api.requests import most_workers
from services.errors import Unavailable
from services.stages.layout import HEARD, STOP
from services.stages.specs import TrainSpec
from services.storage import files
from services.training.driver.capacity import lacking, needs
from services.training.worker.collectives import agreed

LISTEN_EVERY_S = 1.0
LOOK_EVERY_S = 5.0
"""Asking Ray for nodes that are about to go makes workers wait for one another."""


class StopListener:
    """Rank 0's ear, on a thread of its own: a checkpoint that is on its way must not keep it from hearing."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._over = prefix, threading.Event()
        self.heard = False
        threading.Thread(target=self._run, name="stop-listener", daemon=True).start()

    def _run(self) -> None:
        while not self.heard and not self._over.wait(LISTEN_EVERY_S):
            with suppress(OSError, Unavailable):  # not there, or storage is away
                files.read_bytes(files.join(self._prefix, STOP))
                files.write_json(files.join(self._prefix, HEARD), {})
                self.heard = True

    def close(self) -> None:
        """Listen no more."""
        self._over.set()


class Leaving:
    """Every worker asks after every step, and all get one answer. ``stopped``: the run ends here."""

    def __init__(self, spec: TrainSpec, rank: int, world_size: int, device: torch.device) -> None:
        self._listener = StopListener(spec.prefix) if rank == 0 else None
        self._one_more = needs(spec) if rank == 0 and world_size < most_workers(spec.workers) else None
        self._device, self._looked_at = device, time.monotonic()
        self._node_goes = self._node_comes = self.stopped = False

    def after_step(self) -> bool:
        """Whether a checkpoint is needed now.

        For a node that is about to go (a spot machine that is taken back, a pod that is moved), and for one that has come and
        has room for a worker that is missing, there is one checkpoint, and training goes on: Ray Train starts the workers again
        once the node has gone, or when it next looks for more of them.
        """
        look = time.monotonic() - self._looked_at >= LOOK_EVERY_S
        heard = self._listener is not None and self._listener.heard
        self.stopped, look = agreed([heard, look], self._device)
        if not look:
            return self.stopped
        self._looked_at, goes_before, comes_before = time.monotonic(), self._node_goes, self._node_comes
        goes = ray.train.get_preemption_info() is not None
        self._node_goes, self._node_comes = agreed([goes, self._is_room_for_one_more()], self._device)
        return (
            self.stopped or (self._node_goes and not goes_before) or (self._node_comes and not comes_before)
        )

    def _is_room_for_one_more(self) -> bool:
        return self._one_more is not None and lacking(self._one_more, ray.available_resources()) is None

    def close(self) -> None:
        """Nobody asks any more."""
        if self._listener:
            self._listener.close()
