"""How fast is training? Pairs/s of the real loop, against the public recipe and against the floor.

The real loop reads shards and a ledger, writes metrics and a journal, and has one worker. All sides have the
same model, batch size, optimizer and precision, and alternate in one process.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench.cases import OBJECTIVE, WARM_UP, Case, pairs_per_s
from tests.bench.floor import Floor
from tests.bench.measure import Result, Stopwatch, ceiling, in_turn, ratio
from tests.bench.public_recipe import PublicRecipe
from tests.support.encoded_pairs import batch_maker
from tests.support.synthetic_pairs import synthetic_rows

CPU = torch.device("cpu")


def train_speed(scratch: Path) -> dict[str, Result]:
    """``train_vs_public_recipe`` and ``train_vs_floor`` on the shapes model and on the mid-size U-Net."""
    shapes = measure(Case.shapes(scratch / "shapes"), 8, rounds=9)
    return shapes | measure(Case.mid_size(scratch / "mid"), 3, rounds=3)


def measure(case: Case, steps: int, rounds: int) -> dict[str, Result]:
    """From the median of ``steps`` steps a side and round, after the warm-up.

    Short rounds keep the sides close in time, so a load on the machine slows all of them.
    """
    ledger = case.write_ledger()
    runs = itertools.count()
    steps += WARM_UP
    public = public_recipe(case)
    floor = make_floor(case)
    sides = {
        "ours": lambda: pairs_per_s(case.batch_size, case.train(f"run-{next(runs)}", steps, ledger)),
        "public recipe": lambda: case.batch_size / median_step(public.step, steps),
        "floor": lambda: case.batch_size / median_step(floor.step, steps),
    }
    found = in_turn(rounds, sides)
    total_s = sum(public.seconds.values())
    parts = ", ".join(f"{part} {100 * seconds / total_s:.0f}%" for part, seconds in public.seconds.items())
    of = f"steps of {case.batch_size} pairs, images of {case.size_px} px"
    name = f"train_vs_public_recipe{case.title}"
    against = f"the public recipe ({parts}), {of}{ceiling(name)}"
    return {
        name: ratio(found, "ours", "public recipe", "pairs/s", against),
        f"train_vs_floor{case.title}": ratio(found, "ours", "floor", "pairs/s", f"tensors in memory, {of}"),
    }


def public_recipe(case: Case) -> PublicRecipe:
    """On twice a batch of rendered scenes, with their image files in memory."""
    rows = list(synthetic_rows(2 * case.batch_size, size=case.size_px, shared=0.0))
    return PublicRecipe(case.folder, case.config(), CPU, rows, case.size_px, OBJECTIVE.beta, workers=0)


def make_floor(case: Case) -> Floor:
    """On the first batch of the case's pairs."""
    maker = batch_maker(case.folder, case.encoded, OBJECTIVE, **case.training(1))
    rows = maker.rows(0, 0, 1)
    return Floor(case.folder, case.config(), CPU, maker.make(rows), rows.token_ids, OBJECTIVE.beta)


def median_step(step: Callable[[], object], steps: int) -> float:
    """Median seconds of a step, after the warm-up."""
    seconds = []
    for _ in range(steps):
        watch = Stopwatch()
        step()
        seconds.append(watch())
    return statistics.median(seconds[WARM_UP:])
