"""Reasons for an early checkpoint: a request to stop, a node that is leaving, a node that has joined."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import ray
import ray.train
import torch

from services.api.requests import most_workers
from services.errors import Unavailable
from services.stages import layout
from services.stages.specs import TrainSpec
from services.storage import files
from services.training.driver import capacity
from services.training.worker.collectives import any_worker

LISTEN_EVERY_S = 1.0
POLL_NODES_EVERY_S = 5.0
"""A poll of Ray's nodes makes the workers wait for one another."""


class Preemption:
    """Polled by every worker after every step, and while it waits; all workers get the same answer.

    ``stop_requested``: somebody wants the run to stop, so it ends after a checkpoint. ``checkpoint_needed``:
    the run stops, or a node is about to leave (a spot machine, a pod that is moved), or a node has joined
    with room for a missing worker. In the last two cases training continues after the checkpoint, which is
    needed until it is ``answered``: Ray Train restarts the workers once the node has left,
    or when it next looks for more workers.
    """

    def __init__(self, spec: TrainSpec, rank: int, world_size: int, device: torch.device) -> None:
        self._device = device
        self._listener = StopListener(spec.prefix) if rank == 0 else None
        self._needs = capacity.needed(spec)
        self._looks_for_room = rank == 0 and world_size < most_workers(spec.workers)
        self._polled_at = time.monotonic()
        self._node_leaves = False
        self._node_joined = False
        self.stop_requested = False
        self.checkpoint_needed = False

    def poll(self) -> None:
        """Update both answers. Communicates with all workers."""
        is_requested = self._listener is not None and self._listener.requested
        is_time = time.monotonic() - self._polled_at >= POLL_NODES_EVERY_S
        self.stop_requested, is_time = any_worker([is_requested, is_time], self._device)
        self.checkpoint_needed |= self.stop_requested
        if is_time:
            self._poll_nodes()

    def _poll_nodes(self) -> None:
        """One checkpoint for each node that leaves or joins."""
        self._polled_at = time.monotonic()
        is_leaving = ray.train.get_preemption_info() is not None
        leaves, joined = any_worker([is_leaving, self._has_room()], self._device)
        if (leaves and not self._node_leaves) or (joined and not self._node_joined):
            self.checkpoint_needed = True
        self._node_leaves = leaves
        self._node_joined = joined

    def _has_room(self) -> bool:
        """Whether a worker is missing and the cluster has room for it; false on other ranks than 0."""
        return self._looks_for_room and capacity.missing(self._needs, ray.available_resources()) is None

    def answered(self) -> None:
        """A checkpoint of now is stored, or is being stored."""
        self.checkpoint_needed = False

    def close(self) -> None:
        """Stop listening."""
        if self._listener:
            self._listener.close()


class StopListener:
    """Polls storage for a request to stop, on a thread of rank 0, so that a stored checkpoint delays nothing.

    Acknowledges the request in storage; ``requested`` is true from then on.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._closed = threading.Event()
        self.requested = False
        threading.Thread(target=self._run, name="stop-listener", daemon=True).start()

    def _run(self) -> None:
        while not self.requested and not self._closed.wait(LISTEN_EVERY_S):
            with suppress(OSError, Unavailable):  # no request yet, or storage is unreachable
                files.read_bytes(layout.stop_uri(self._prefix))
                files.write_json(layout.stop_ack_uri(self._prefix), {})
                self.requested = True

    def close(self) -> None:
        """Stop listening."""
        self._closed.set()
