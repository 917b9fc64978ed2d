"""How much of training's time do checkpoints take?

Two figures: the seconds for which training stalls while the state is copied (as the loop measures them), over
the seconds of the steps; and the wall-clock time that a whole run loses against the same run without
checkpoints, because hashing and storing in the background use the same cores and disk.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.stages.specs import JournalEvent
from tests.bench.cases import WARM_UP, Case, step_seconds
from tests.bench.measure import Result, in_turn, result

EVERY = 20
"""Steps between checkpoints."""
PERIODS = 2
"""A run counts the steps of so many checkpoint periods."""
STORED = 10
"""Steps counted after the last checkpoint, while it is stored in the background."""
STEPS = PERIODS * EVERY + STORED + 1
"""The last step is not counted: it always stores a checkpoint."""


def checkpoint_stall(scratch: Path) -> dict[str, Result]:
    """``checkpoint_stall`` on the shapes model and on the mid-size U-Net.

    The mid-size U-Net trains on 2 pairs a step: a short step makes a checkpoint's cost visible.
    """
    shapes = measure(Case.shapes(scratch / "shapes"), rounds=3)
    return shapes | measure(Case.mid_size(scratch / "mid", batch_size=2), rounds=1)


def measure(case: Case, rounds: int) -> dict[str, Result]:
    """Alternate runs with checkpoints and without."""
    ledger = case.write_ledger()
    runs = itertools.count()
    stalls: list[float] = []

    def run_seconds(every: int) -> float:
        steps = counted(case.train(f"run-{next(runs)}", STEPS, ledger, checkpoint_every=every))
        if every == EVERY:
            stalls.append(stall_fraction(steps))
        return sum(step_seconds(steps))

    seconds = in_turn(rounds, {"with": lambda: run_seconds(EVERY), "without": lambda: run_seconds(STEPS)})
    return results(case.title, f"steps of {case.batch_size} pairs", stalls, seconds)


def counted(steps: Sequence[JournalEvent]) -> Sequence[JournalEvent]:
    """The steps of a run that are counted, and the warm-up before them."""
    return steps[STORED - WARM_UP : -1]


def stall_fraction(steps: Sequence[JournalEvent]) -> float:
    """Seconds that training stalled for checkpoints over the seconds of the steps, after the warm-up."""
    stalled_s = sum((entry.metrics or {})["checkpoint_stall_s"] for entry in steps[WARM_UP:])
    return stalled_s / sum(step_seconds(steps))


def results(
    title: str, of: str, stalls: Sequence[float], seconds: Mapping[str, Sequence[float]]
) -> dict[str, Result]:
    """From the median round: the fraction of time that training stalled, and by which the run was longer."""
    rounds = list(zip(seconds["with"], seconds["without"], strict=True))
    step_s = statistics.median(seconds["with"]) / (PERIODS * EVERY)
    stall = statistics.median(stalls)
    stall_ms = 1000 * stall * step_s * EVERY
    longer = sorted(a / b - 1 for a, b in rounds)
    lost_ms = 1000 * statistics.median(a - b for a, b in rounds) / PERIODS
    name = f"checkpoint_stall{title}"
    unit = "ms a checkpoint"
    what = f"{of} ({step_s:.3g} s), a checkpoint every {EVERY}"
    copied = f"{what}: training stalls while the state is copied"
    spread = f"{len(longer)} rounds, {100 * longer[0]:+.1f}% to {100 * longer[-1]:+.1f}%"
    whole = f"{what}, hashed and stored in the background; the same without: {spread}"
    return {
        name: result(stall, stall_ms, unit, copied),
        f"{name}, whole run": result(statistics.median(longer), lost_ms, unit, whole),
    }
