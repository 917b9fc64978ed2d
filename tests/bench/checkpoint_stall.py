"""What part of training's time do checkpoints take? The seconds for which training stands while the state is copied, as the
loop tells, over the seconds of the steps. And what a whole run loses by the clock on the wall, against the same run without
checkpoints: hashing and storing go on beside training, and take of the same cores and disk."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.stages.specs import JournalEvent
from tests.bench.cases import WARM_UP, Case, step_seconds
from tests.bench.measure import Result, in_turn, result

EVERY, PERIODS, STORED = 20, 2, 10
"""A checkpoint every 20 steps; of a run as many steps are counted as two of these periods have, the last 10 of them after the
last checkpoint, which is stored in that time."""
STEPS = PERIODS * EVERY + STORED + 1
"""The last step, which always stores a checkpoint, is not counted."""


def checkpoint_stall(scratch: Path) -> dict[str, Result]:
    """``checkpoint_stall`` on the shapes model and on the mid-size U-Net (2 pairs a step: the less a step does, the more a
    checkpoint weighs)."""
    shapes = measure(Case.shapes(scratch / "shapes"), rounds=3)
    return shapes | measure(Case.mid_size(scratch / "mid", batch_size=2), rounds=1)


def measure(case: Case, rounds: int) -> dict[str, Result]:
    """Runs with checkpoints and without, in turn."""
    ledger, runs, shares = case.write_ledger(), itertools.count(), []

    def seconds(every: int) -> float:
        told = counted(case.train(f"run-{next(runs)}", STEPS, ledger, checkpoint_every=every))
        if every == EVERY:
            shares.append(stalled_share(told))
        return sum(step_seconds(told))

    found = in_turn(rounds, {"with": lambda: seconds(EVERY), "without": lambda: seconds(STEPS)})
    return entries(case.title, f"steps of {case.batch_size} pairs", shares, found)


def counted(told: Sequence[JournalEvent]) -> Sequence[JournalEvent]:
    """Of a run's steps those that count, behind a warm-up."""
    return told[STORED - WARM_UP : -1]


def stalled_share(told: Sequence[JournalEvent]) -> float:
    """Seconds for which training stood for checkpoints over those of the steps, after the warm-up."""
    stalled_s = sum((entry.metrics or {})["checkpoint_stall_s"] for entry in told[WARM_UP:])
    return stalled_s / sum(step_seconds(told))


def entries(
    title: str, of: str, shares: Sequence[float], found: Mapping[str, Sequence[float]]
) -> dict[str, Result]:
    """By the median round, both as parts of the time: that in which training stood, and by which the run was longer."""
    step_s = statistics.median(found["with"]) / (PERIODS * EVERY)
    share, longer = (
        statistics.median(shares),
        sorted(a / b - 1 for a, b in zip(found["with"], found["without"], strict=True)),
    )
    lost_s = statistics.median(a - b for a, b in zip(found["with"], found["without"], strict=True)) / PERIODS
    what = f"{of} ({step_s:.3g} s), a checkpoint every {EVERY}"
    walls = f"the same without: {len(longer)} rounds, {100 * longer[0]:+.1f}% to {100 * longer[-1]:+.1f}%"
    stall_ms, unit, name = 1000 * share * step_s * EVERY, "ms a checkpoint", f"checkpoint_stall{title}"
    return {
        name: result(share, stall_ms, unit, f"{what}: training stands while the state is copied"),
        f"{name}, whole run": result(
            statistics.median(longer), 1000 * lost_s, unit, f"{what}, hashed and stored beside; {walls}"
        ),
    }
