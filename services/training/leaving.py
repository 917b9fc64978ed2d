"""Why training leaves its workers before it is done: it was asked to stop, or a node is about to go. All of them agree."""

from __future__ import annotations

import time

import ray.train
import torch

from services.training.gathering import agreed

LOOK_EVERY_S = 5.0
"""Asking Ray for nodes that are about to go makes workers wait for one another."""


class Leaving:
    """Every worker asks after every step, and all get one answer. ``stopped``: the run ends here."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._looked_at = device, time.monotonic()
        self._node_goes = self.stopped = False

    def after_step(self, asked: bool) -> bool:
        """Whether a checkpoint is needed now. ``asked``: this worker has heard that the run is to end.

        For a node that is about to go (a spot machine that is taken back, a pod that is moved) there is one checkpoint, and
        training goes on: Ray Train starts the workers again once the node has gone.
        """
        look = time.monotonic() - self._looked_at >= LOOK_EVERY_S
        self.stopped, look = agreed([asked, look], self._device)
        if look:
            self._looked_at = time.monotonic()
            goes = ray.train.get_preemption_info() is not None
            goes, self._node_goes = goes and not self._node_goes, goes
            return self.stopped or goes
        return self.stopped
