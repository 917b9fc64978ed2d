"""How far a job is, worked out from what the API says: no terminal, no network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.client.types import Job, MetricRow

UNITS = {"encode": "images", "ledger": "pairs", "train": "steps", "evaluate": "pictures"}
"""What a stage counts: a metric of this name where it has one, else its steps."""
NUMBERS = {
    "loss": "loss",
    "implicit_accuracy": "implicit accuracy",
    "winner_error_diff": "winner error",
    "loser_error_diff": "loser error",
}
"""Training metrics that are shown, under the words that people read."""
WINDOW_S = 20.0
"""The rate is that of the last this many seconds."""


@dataclass
class StageProgress:
    """One stage: ``done`` of ``total`` ``unit``s (0: not known), ``numbers`` of the last step, ``seconds`` once it is over."""

    stage: str
    unit: str
    done: int = 0
    total: int = 0
    seconds: float | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    cursor: int | None = None
    _told: float | None = None
    _first: tuple[float, int] | None = None
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    def take(self, row: MetricRow) -> None:
        """Take one row in; one that is not new says nothing."""
        if self.cursor is not None and row.step <= self.cursor:
            return
        self.cursor = row.step
        self.done = int(row.metrics.get(self.unit, row.step))
        self.total = int(row.metrics.get(f"{self.unit}_total", self.total))
        self.numbers = {words: row.metrics[name] for name, words in NUMBERS.items() if name in row.metrics}
        self._told = row.metrics.get(f"{self.unit}_per_s")
        self._first = self._first or (row.at, self.done)
        self._recent.append((row.at, self.done))
        while row.at - self._recent[0][0] > WINDOW_S and len(self._recent) > 2:
            self._recent.popleft()

    @property
    def rate(self) -> float | None:
        """Units a second: as the stage says, else lately, and once it is over of all of it without its start-up."""
        if self._told is not None:
            return self._told
        if self._first is None or len(self._recent) < 2:
            return None
        (began, first), (ended, last) = (
            self._recent[0] if self.seconds is None else self._first,
            self._recent[-1],
        )
        return (last - first) / (ended - began) if ended > began else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the present rate."""
        rate = self.rate
        return (self.total - self.done) / rate if rate and self.total and self.seconds is None else None


class JobProgress:
    """Every stage of one job that has begun."""

    def __init__(self) -> None:
        self.stages: dict[str, StageProgress] = {}

    def unread(self, job: Job) -> list[str]:
        """Stages of which there may be more to read: the one that runs, and those that were not over when last read."""
        begun = [stage for stage in UNITS if stage == job.stage or job.stage_seconds.get(stage) is not None]
        return [stage for stage in begun if stage not in self.stages or self.stages[stage].seconds is None]

    def update(self, job: Job, stage: str, rows: Iterable[MetricRow]) -> None:
        """Take in new rows of a stage, read after ``job`` was."""
        progress = self.stages.setdefault(stage, StageProgress(stage, UNITS[stage]))
        progress.seconds = job.stage_seconds.get(stage)
        progress.total = int(job.training.get("steps", 0)) if stage == "train" else progress.total
        for row in rows:
            progress.take(row)

    def cursor(self, stage: str) -> int | None:
        """The last step seen of a stage: the next question starts there."""
        return self.stages[stage].cursor if stage in self.stages else None


def describe(stage: StageProgress) -> str:
    """One plain line: ``train 57/120 steps (48%), 1.3/s, 48 s left, loss 0.6931, ...``."""
    count = f"{stage.done}/{stage.total}" if stage.total else f"{stage.done}"
    share = f" ({100 * stage.done // stage.total}%)" if stage.total else ""
    said = [f"{stage.stage:<8} {count} {stage.unit}{share}"]
    return ", ".join([*said, *pace(stage), *numbers(stage)])


def pace(stage: StageProgress) -> list[str]:
    """The rate, and the time that is left or was taken, as words."""
    said = (
        [] if stage.rate is None else [f"{stage.rate:,.0f}/s" if stage.rate >= 100 else f"{stage.rate:.3g}/s"]
    )
    if stage.seconds is not None:
        said.append(f"done in {stage.seconds:.1f} s")
    elif stage.eta_s is not None:
        said.append(f"{stage.eta_s:.0f} s left")
    return said


def numbers(stage: StageProgress) -> list[str]:
    """The last step's numbers as words."""
    signed = ("winner error", "loser error")
    return [
        f"{words} {value:{'+.5f' if words in signed else '.4f'}}" for words, value in stage.numbers.items()
    ]
