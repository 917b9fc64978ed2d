"""The evaluate stage: compare two models on held-out prompts, write a report and a picture grid."""

from __future__ import annotations

import time

import numpy as np

from dde_core.image_grid import draw_grid
from dde_core.metrics import beat_ratio, paired_difference
from services.api.records import EvaluateResult, Interval, ScorerReport
from services.api.requests import Scorer
from services.artifacts.prompts import read_prompts
from services.evaluation.compare import SIDES, compare
from services.stages.journal import Journal
from services.stages.specs import EvaluateSpec
from services.storage import files

GRID_PROMPTS = 16


def evaluate(spec: EvaluateSpec, journal: Journal) -> EvaluateResult:
    """Draw, score, compare. Raises BadRequest where there are fewer prompts than asked for."""
    began, prompts = time.monotonic(), read_prompts(spec.evaluation.prompts_uri, spec.evaluation.num_prompts)
    journal.event(f"{len(prompts)} prompts from {spec.base.name} and {spec.candidate.name}")
    rows: dict[int, dict] = {}
    for chunk in compare(spec, prompts):
        rows |= {
            int(index): {name: values[i] for name, values in chunk.items()}
            for i, index in enumerate(chunk["index"])
        }
        done = {"pictures": len(SIDES) * len(rows), "pictures_total": len(SIDES) * len(prompts)}
        journal.metrics(len(rows), {**done, "pictures_per_s": done["pictures"] / (time.monotonic() - began)})

    ordered = [rows[i] for i in range(len(prompts))]
    scores = {name: _compare_scores(name, ordered) for name in spec.evaluation.scorers}
    shown = ordered[:GRID_PROMPTS]
    grid_uri, report_uri = files.join(spec.output, "grid.png"), files.join(spec.output, "report.json")
    names = (spec.base.name, spec.candidate.name)
    pictures = [(name, [row[side] for row in shown]) for name, side in zip(names, SIDES, strict=True)]
    files.write_bytes(grid_uri, draw_grid([row["prompt"] for row in shown], pictures))
    files.write_json(report_uri, _report(spec, ordered, scores))
    return EvaluateResult(
        report=report_uri,
        grid=grid_uri,
        num_prompts=len(prompts),
        scores=scores,
        seconds=time.monotonic() - began,
    )


def _compare_scores(name: str, rows: list[dict]) -> ScorerReport:
    base, candidate = ([float(row[f"{side}_{name}"]) for row in rows] for side in SIDES)
    return ScorerReport(
        base=float(np.mean(base)),
        candidate=float(np.mean(candidate)),
        difference=_interval(paired_difference(candidate, base)),
        beat_ratio=_interval(beat_ratio(candidate, base)),
    )


def _interval(numbers: tuple[float, float, float]) -> Interval:
    value, low, high = map(float, numbers)
    return Interval(value=value, low=low, high=high)


def _report(spec: EvaluateSpec, rows: list[dict], scores: dict[Scorer, ScorerReport]) -> dict:
    """Everything that is needed to repeat the comparison, and every number it came from."""
    columns = [f"{side}_{name}" for side in SIDES for name in spec.evaluation.scorers]
    return {
        "base": spec.base.model_dump(mode="json"),
        "candidate": spec.candidate.model_dump(mode="json"),
        "evaluation": spec.evaluation.model_dump(mode="json"),
        "conventions": "sampler DDIM, eta 0; seed of prompt i is seed + i; ties count half; beat ratio: Wilson 95%",
        "scores": {name: report.model_dump() for name, report in scores.items()},
        "prompts": [
            {"prompt": str(row["prompt"]), **{column: float(row[column]) for column in columns}}
            for row in rows
        ],
    }
