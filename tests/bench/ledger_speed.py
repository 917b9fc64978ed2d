"""How much faster is training on a ledger? Pairs/s of the real loop, against the reference in every step.

Also the ceiling: (forward and backward + forward) / (forward and backward) of the U-Net alone.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import torch

from dde_core.models.folder import ModelFolder
from dde_core.train_step import PairBatch, pair_errors
from tests.bench.cases import OBJECTIVE, WARM_UP, Case, pairs_per_s
from tests.bench.measure import Result, Stopwatch, in_turn, ratio, result
from tests.support.encoded_pairs import batch_maker


def ledger_speed(scratch: Path, rounds: int = 3) -> dict[str, Result]:
    """``ledger_vs_online`` on the shapes model (64 pairs a step) and the mid-size U-Net (4 pairs a step)."""
    shapes = _measure(Case.shapes(scratch / "shapes"), 12, rounds)
    return shapes | _measure(Case.mid_size(scratch / "mid"), 4, rounds)


def _measure(case: Case, steps: int, rounds: int) -> dict[str, Result]:
    """From the median of ``steps`` steps a side and round, after the warm-up."""
    ledger = case.write_ledger()
    runs = itertools.count()
    steps += WARM_UP
    sides = {
        "ledger": lambda: pairs_per_s(case.batch_size, case.train(f"run-{next(runs)}", steps, ledger)),
        "online": lambda: pairs_per_s(case.batch_size, case.train(f"run-{next(runs)}", steps, None)),
    }
    what = f"the reference in every step of {case.batch_size} pairs"
    found = ratio(in_turn(rounds, sides), "ledger", "online", "pairs/s", what)
    maker = batch_maker(case.folder, case.encoded, OBJECTIVE, batch_size=case.batch_size)
    with_gradient, forward = _passes(case.folder, maker.make(maker.rows(0, 0, 1)))
    passes = f"forward and backward {with_gradient:.3f} s, forward {forward:.3f} s"
    against = f"{passes}, of {case.batch_size} pairs"
    ceiling = (with_gradient + forward) / with_gradient
    name = f"ledger_vs_online{case.title}"
    return {name: found, f"{name}, ceiling": result(ceiling, with_gradient, "s", against)}


def _passes(model: ModelFolder, batch: PairBatch, rounds: int = 3) -> tuple[float, float]:
    """Median seconds of the U-Net's forward and backward, and of its forward alone, on one batch."""
    unet, schedule = model.unet(), model.schedule()
    torch.set_num_threads(1)

    def with_gradient() -> float:
        watch = Stopwatch()
        errors = pair_errors(unet, schedule, batch)
        (errors.w - errors.l).sum().backward()
        return watch()

    def forward() -> float:
        watch = Stopwatch()
        with torch.no_grad():
            pair_errors(unet, schedule, batch)
        return watch()

    found = in_turn(rounds, {"forward and backward": with_gradient, "forward": forward})
    return statistics.median(found["forward and backward"]), statistics.median(found["forward"])
