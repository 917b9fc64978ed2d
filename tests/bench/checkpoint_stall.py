"""What part of training's time do checkpoints take? The seconds that the training thread spent on them, as the loop tells, over
the seconds of the steps; and as a check the time of the same steps in runs with checkpoints and without."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from services.contracts import JournalEvent
from tests.bench.cases import WARM_UP, Case, step_seconds
from tests.bench.measure import Result, in_turn, result

EVERY, PERIODS = 20, 2
STEPS = WARM_UP + PERIODS * EVERY + 1
"""The last step, which always stores a checkpoint, is not counted; so every period that is has one."""


def checkpoint_stall(scratch: Path) -> dict[str, Result]:
    """``checkpoint_stall``: a share of the steps' time, on the shapes model and on the mid-size U-Net (2 pairs a step: the
    less a step does, the more a checkpoint weighs)."""
    shapes = measure(Case.shapes(scratch / "shapes"), rounds=3)
    return shapes | measure(Case.mid_size(scratch / "mid", batch_size=2), rounds=1)


def measure(case: Case, rounds: int) -> dict[str, Result]:
    """By the median round. In ``against`` what the clock on the wall says."""
    ledger, runs, shares = case.write_ledger(), itertools.count(), []

    def seconds(every: int) -> float:
        told = case.train(f"run-{next(runs)}", STEPS, ledger, checkpoint_every=every)[:-1]
        if every == EVERY:
            shares.append(stalled_share(told))
        return sum(step_seconds(told))

    found = in_turn(rounds, {"with": lambda: seconds(EVERY), "without": lambda: seconds(STEPS)})
    longer = [100 * (a / b - 1) for a, b in zip(found["with"], found["without"], strict=True)]
    walls = f"on the wall {min(longer):+.1f}% to {max(longer):+.1f}% against runs without"
    share, step_s = statistics.median(shares), statistics.median(found["with"]) / (PERIODS * EVERY)
    against = f"steps of {case.batch_size} pairs ({step_s:.3g} s), a checkpoint every {EVERY}; {walls}"
    return {f"checkpoint_stall{case.title}": result(share, 1000 * share * step_s * EVERY, "ms a checkpoint", against)}


def stalled_share(told: Sequence[JournalEvent]) -> float:
    """Seconds spent on checkpoints over those of the steps, after the warm-up."""
    stalled_s = sum((entry.metrics or {})["checkpoint_stall_s"] for entry in told[WARM_UP:])
    return stalled_s / sum(step_seconds(told))
