"""Where the time of a training step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SMOOTHING = 0.1
"""Weight of the newest step in the moving average that ``eta_s`` is computed from."""


class StepTimer:
    """Times the current step: in total, waiting for data, stalled by checkpoints. Estimates the time left."""

    def __init__(self, batch_size: int, steps: int) -> None:
        self._batch_size = batch_size
        self._steps = steps
        self._mean_s = 0.0

    def begin(self) -> None:
        """Start a step."""
        self._began = time.monotonic()
        self._data_wait_s = 0.0
        self._checkpoint_stall_s = 0.0

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Time the block as waiting for data: rows, text embeddings and draws of a batch."""
        began = time.monotonic()
        yield
        self._data_wait_s += time.monotonic() - began

    @contextmanager
    def checkpoint_stall(self) -> Iterator[None]:
        """Time the block as stalled by a checkpoint."""
        began = time.monotonic()
        yield
        self._checkpoint_stall_s += time.monotonic() - began

    def metrics(self, step: int, device: torch.device) -> dict[str, float]:
        """Metrics of step number ``step``, which ends now. Memory is the device's peak, or the process's."""
        seconds = time.monotonic() - self._began
        self._mean_s += (SMOOTHING if self._mean_s else 1.0) * (seconds - self._mean_s)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
        return {
            "pairs_per_s": self._batch_size / seconds,
            "data_wait": self._data_wait_s / seconds,
            "checkpoint_stall_s": self._checkpoint_stall_s,
            "memory_gb": peak / 1e9,
            "eta_s": self._mean_s * (self._steps - step),
        }


def peak_resident_bytes() -> int:
    """Peak resident memory of this program. (``getrusage`` starts at the peak of the parent process.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
