"""A job's progress, computed from the API's answers. Uses no terminal and no network."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from services.api.answers import JobView, MetricView
from services.api.records import Stage

UNITS: dict[Stage, str] = {"encode": "images", "ledger": "pairs", "train": "steps", "evaluate": "images"}
"""What a stage counts."""
COUNTERS: dict[Stage, str] = {**UNITS, "evaluate": "pictures"}
"""The metric that counts: COUNTER, COUNTER_total and COUNTER_per_s. A stage without it counts its steps."""
NUMBERS = {
    "loss": "loss",
    "implicit_accuracy": "implicit accuracy",
    "winner_error_diff": "winner error",
    "loser_error_diff": "loser error",
}
"""The training metrics to show, and their labels."""
ROUND_NUMBERS = {
    "rollout_reward": "reward",
    "rollout_gap": "gap",
    "rollout_kept_share": "pairs kept",
    "rollout_bad": "bad rewards",
}
"""The metrics of a round of rollouts to show, until the next round, and their labels."""
SIGNED = ("winner error", "loser error")
COUNTS = ("bad rewards",)
WINDOW_S = 20.0
"""The rate of a running stage is averaged over this many seconds."""


@dataclass
class StageProgress:
    """One stage: ``done`` of ``total`` units (0: unknown), the last ``numbers``, ``seconds`` once ended.

    Training of an on-policy method is in ``round`` of ``rounds``, counted from 1; 0 of 0 without rounds.
    """

    stage: Stage
    done: int = 0
    total: int = 0
    seconds: float | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    round: int = 0
    rounds: int = 0
    cursor: int | None = None
    _reported_rate: float | None = None
    _first: tuple[float, int] | None = None
    _recent: deque[tuple[float, int]] = field(default_factory=deque)
    _of_round: dict[str, float] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        return UNITS[self.stage]

    def add(self, row: MetricView) -> None:
        """Add a row of metrics, or the last one again with what was reported since; ignore earlier ones."""
        if self.cursor is not None and row.step < self.cursor:
            return
        if row.step == self.cursor:
            self._recent.pop()
        counter = COUNTERS[self.stage]
        self.cursor = row.step
        self.done = int(row.metrics.get(counter, row.step))
        self.total = int(row.metrics.get(f"{counter}_total", self.total))
        self.round = int(row.metrics.get("round", self.round - 1)) + 1  # the metric counts from 0
        self._of_round |= _shown(row, ROUND_NUMBERS)
        self.numbers = _shown(row, NUMBERS) | self._of_round
        self._reported_rate = row.metrics.get(f"{counter}_per_s")
        self._first = self._first or (row.at, self.done)
        self._recent.append((row.at, self.done))
        while row.at - self._recent[0][0] > WINDOW_S and len(self._recent) > 2:
            self._recent.popleft()

    @property
    def rate(self) -> float | None:
        """Units per second: the stage's own number if it reports one, else the average since the first row.

        While the stage runs, the average is over the last ``WINDOW_S``.
        """
        if self._reported_rate is not None:
            return self._reported_rate
        if self._first is None or len(self._recent) < 2:
            return None
        began, first = self._recent[0] if self.seconds is None else self._first
        ended, last = self._recent[-1]
        return (last - first) / (ended - began) if ended > began else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate; None if unknown or ended."""
        rate = self.rate
        if not rate or not self.total or self.seconds is not None:
            return None
        return (self.total - self.done) / rate


def _shown(row: MetricView, labels: Mapping[str, str]) -> dict[str, float]:
    return {label: row.metrics[name] for name, label in labels.items() if name in row.metrics}


class JobProgress:
    """The stages of one job that have started."""

    def __init__(self) -> None:
        self.stages: dict[str, StageProgress] = {}

    def unread(self, job: JobView) -> list[Stage]:
        """Stages that may have new rows: the running one, and those that had not ended when last read."""
        started = [stage for stage in UNITS if stage == job.stage or job.stage_seconds.get(stage) is not None]
        return [stage for stage in started if stage not in self.stages or self.stages[stage].seconds is None]

    def update(self, job: JobView, stage: Stage, rows: Iterable[MetricView]) -> None:
        """Add new rows of a stage. The rows must be read after ``job``."""
        progress = self.stages.setdefault(stage, StageProgress(stage))
        progress.seconds = job.stage_seconds.get(stage)
        if stage == "train":
            progress.total = int(job.training.get("steps", 0))
            if job.rollouts is not None:
                progress.rounds = math.ceil(progress.total / job.rollouts["updates_per_round"])
        for row in rows:
            progress.add(row)

    def cursor(self, stage: str) -> int | None:
        """The last step that was read of a stage."""
        return self.stages[stage].cursor if stage in self.stages else None

    def after(self, stage: str) -> int | None:
        """After which step the next request starts: the last row is read again, for it may have grown.

        Rollouts, validation and checkpoints of a step are reported later than the step.
        """
        cursor = self.cursor(stage)
        return None if cursor is None else cursor - 1


def describe(stage: StageProgress) -> str:
    """One plain line: ``train 57/120 steps (48%), 1.3/s, 48 s left, loss 0.6931, ...``."""
    count = f"{stage.done}/{stage.total}" if stage.total else f"{stage.done}"
    percent = f" ({100 * stage.done // stage.total}%)" if stage.total else ""
    parts = [f"{stage.stage:<8} {count} {stage.unit}{percent}", *pace(stage), *rounds(stage), *numbers(stage)]
    return ", ".join(parts)


def rounds(stage: StageProgress) -> list[str]:
    """``round 3 of 30`` as text, once a round was reported."""
    return [f"round {stage.round} of {stage.rounds}"] if stage.round else []


def pace(stage: StageProgress) -> list[str]:
    """The rate, and the seconds left or taken, as text."""
    parts = []
    if stage.rate is not None:
        parts.append(f"{stage.rate:,.0f}/s" if stage.rate >= 100 else f"{stage.rate:.3g}/s")
    if stage.seconds is not None:
        parts.append(f"done in {stage.seconds:.1f} s")
    elif stage.eta_s is not None:
        parts.append(f"{stage.eta_s:.0f} s left")
    return parts


def numbers(stage: StageProgress) -> list[str]:
    """The last step's numbers as text; differences carry a sign, and counts are whole."""
    forms = dict.fromkeys(SIGNED, "+.5f") | dict.fromkeys(COUNTS, ".0f")
    return [f"{label} {value:{forms.get(label, '.4f')}}" for label, value in stage.numbers.items()]
