"""How much faster are two actors of the evaluate stage, and what does it spend beside models and scorers?"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from dde_core.config import SampleConfig
from dde_core.shapes import PROMPTS_FILE
from services.api.requests import EvaluationConfig
from services.artifacts.scorers import BUILT_IN
from services.evaluation.evaluate import evaluate
from services.stages.journal import Journal, read_journal
from services.stages.specs import EvaluateSpec
from tests.bench.measure import Result, in_turn, ratio, result
from tests.support.evaluate_here import record_of
from tests.support.stage_runs import StageRuns, shapes_record
from tests.support.tiny_folders import sd15_folder

PROMPTS = 200
STEPS = 10


def evaluate_speed(scratch: Path, rounds: int = 2) -> dict[str, Result]:
    """``evaluate_two_actors_vs_one``: images/s of the whole stage. ``evaluate_overhead``: the share of an
    actor's time that is neither the model nor a scorer, once it runs: reading, PNGs, writing."""
    bench = Bench(scratch)
    sides = {"two actors": lambda: bench.images_per_s(2), "one actor": lambda: bench.images_per_s(1)}
    found = in_turn(rounds, sides)
    shares = sorted(bench.overheads)
    images = f"{2 * PROMPTS} images of 32 px, {STEPS} steps, 3 scorers"
    spread = f"{len(shares)} runs, {shares[0]:.3f} to {shares[-1]:.3f}"
    share = statistics.median(shares)
    return {
        "evaluate_two_actors_vs_one": ratio(
            found, "two actors", "one actor", "images/s", f"one actor, {images}"
        ),
        "evaluate_overhead": result(
            share, 100 * share, "% of an actor's time", f"all of it, {images}; {spread}"
        ),
    }


class Bench:
    """``overheads`` of all runs so far."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._models = [shapes_record(), record_of("random", sd15_folder(scratch / "random"))]
        self.overheads: list[float] = []

    def images_per_s(self, actors: int) -> float:
        """Of one run of the stage, which draws every image."""
        runs = StageRuns(tempfile.mkdtemp(dir=self._scratch), {})
        config = EvaluationConfig(
            prompts_uri=PROMPTS_FILE.as_uri(), num_prompts=PROMPTS, sample=SampleConfig(steps=STEPS)
        )
        spec = EvaluateSpec(
            **runs.frame("evaluate"),
            models=list(self._models),
            base="shapes",
            scorers=[BUILT_IN[name] for name in config.scorers],
            evaluation=config,
            images=runs.prefix("images"),
            output=runs.prefix("evaluate"),
            actors=actors,
        )
        journal = Journal(spec.prefix)
        done = evaluate(spec, journal)
        journal.flush()
        entries = [entry for _, some in read_journal(spec.prefix, 0) for entry in some]
        seconds = [entry.metrics for entry in entries if entry.metrics][-1]
        self.overheads.append(1 - (seconds["draw_s"] + seconds["score_s"]) / seconds["total_s"])
        return 2 * PROMPTS / done.seconds
