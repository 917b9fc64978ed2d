"""What runs the stages of jobs: a Protocol. Its implementations differ in where a run finds its cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

RunState = Literal["pending", "running", "succeeded", "failed", "stopped", "unknown"]


@dataclass(frozen=True)
class RunStatus:
    """What a launcher reports of a run.

    ``reason`` is one word of what runs it, such as "Suspended"; ``message`` explains it. ``is_final``: the
    run failed, and another attempt would fail in the same way. ``is_evicted``: the cluster took the run's
    machines for others, which is no failure of the run.
    """

    state: RunState
    reason: str | None = None
    message: str | None = None
    is_final: bool = False
    is_evicted: bool = False

    def __str__(self) -> str:
        """``failed (AppFailed: exit code 1)``."""
        details = ": ".join(part for part in (self.reason, self.message) if part)
        return f"{self.state} ({details})" if details else self.state


@dataclass(frozen=True)
class Needs:
    """The machines of a run: between ``least`` and ``most`` workers, each with ``gpus`` GPUs."""

    least: int = 1
    most: int = 1
    gpus: int = 0


@dataclass(frozen=True)
class Run:
    """A command to run. ``id`` is the caller's; ``metadata`` names job, stage, attempt and project.

    ``prefix`` is the attempt's folder in storage. ``starts_within_s``: how long it may wait for machines;
    ``ends_within_s``: how long it may take in all. None: no limit.
    """

    id: str
    command: str
    prefix: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    needs: Needs = Needs()
    starts_within_s: float | None = None
    ends_within_s: float | None = None


class Launcher(Protocol):
    """Runs commands under ids that the caller chooses. Every method raises Unavailable without an answer.

    A run is over only when nothing of it can run any more: until then its state is "pending" or "running".
    """

    def submit(self, run: Run) -> None:
        """Start the run. A second submit with the same id does nothing.

        Raises Refused if it can never start as it is.
        """

    def status(self, run_id: str) -> RunStatus:
        """The run's status; its state is "unknown" if the run was never submitted."""

    def stop(self, run_id: str) -> None:
        """Request the run's end without waiting for it. Does nothing for an unknown run."""

    def log_tail(self, run_id: str) -> str:
        """The last lines of the driver's output, as far as the cluster still has it; else ""."""
