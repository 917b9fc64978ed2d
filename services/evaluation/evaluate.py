"""The evaluate stage: compare two models on held-out prompts, write a report and an image grid."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from dde_core.image_grid import draw_grid
from dde_core.metrics import beat_ratio, paired_difference
from services.api.records import EvaluateResult, Interval, ScorerReport
from services.api.requests import Scorer
from services.artifacts.prompts import read_prompts
from services.evaluation.compare import SIDES, compare
from services.stages import layout
from services.stages.journal import Journal
from services.stages.specs import EvaluateSpec
from services.storage import files

GRID_PROMPTS = 16
CONVENTIONS = (
    "sampler DDIM, eta 0; seed of prompt i is seed + i; ties count half; intervals: 95% over prompts"
)

Row = dict[str, Any]
"""One prompt: ``index``, ``prompt``, an image of each side, and ``SIDE_SCORER`` for each score."""


def evaluate(spec: EvaluateSpec, journal: Journal) -> EvaluateResult:
    """Generate, score and compare. Raises BadRequest if the file holds fewer than ``num_prompts`` prompts."""
    began = time.monotonic()
    prompts = read_prompts(spec.evaluation.prompts_uri, spec.evaluation.num_prompts)
    journal.event(f"{len(prompts)} prompts from {spec.base.name} and {spec.candidate.name}")
    rows = _rows_of_prompts(spec, prompts, journal, began)
    scores = {name: _compare_scores(name, rows) for name in spec.evaluation.scorers}
    grid_uri = layout.grid_uri(spec.output)
    report_uri = layout.report_uri(spec.output)
    files.write_bytes(grid_uri, _grid(spec, rows[:GRID_PROMPTS]))
    files.write_json(report_uri, _report(spec, rows, scores))
    return EvaluateResult(
        report=report_uri,
        grid=grid_uri,
        num_prompts=len(prompts),
        scores=scores,
        seconds=time.monotonic() - began,
    )


def _rows_of_prompts(spec: EvaluateSpec, prompts: list[str], journal: Journal, began: float) -> list[Row]:
    """One row per prompt, in the order of prompts; logs progress after each chunk."""
    rows: dict[int, Row] = {}
    for chunk in compare(spec, prompts):
        for i, index in enumerate(chunk["index"]):
            rows[int(index)] = {name: values[i] for name, values in chunk.items()}
        done = {"pictures": len(SIDES) * len(rows), "pictures_total": len(SIDES) * len(prompts)}
        journal.metrics(len(rows), {**done, "pictures_per_s": done["pictures"] / (time.monotonic() - began)})
    return [rows[i] for i in range(len(prompts))]


def _compare_scores(name: str, rows: list[Row]) -> ScorerReport:
    base, candidate = ([float(row[f"{side}_{name}"]) for row in rows] for side in SIDES)
    difference = paired_difference(candidate, base)
    ratio = beat_ratio(candidate, base)
    return ScorerReport(
        base=float(np.mean(base)),
        candidate=float(np.mean(candidate)),
        difference=Interval(value=difference.value, low=difference.low, high=difference.high),
        beat_ratio=Interval(value=ratio.value, low=ratio.low, high=ratio.high),
    )


def _grid(spec: EvaluateSpec, rows: list[Row]) -> bytes:
    """The image grid as PNG: base and candidate side by side for each prompt."""
    names = (spec.base.name, spec.candidate.name)
    images = [(name, [row[side] for row in rows]) for name, side in zip(names, SIDES, strict=True)]
    return draw_grid([row["prompt"] for row in rows], images)


def _report(spec: EvaluateSpec, rows: list[Row], scores: dict[Scorer, ScorerReport]) -> dict[str, Any]:
    """Everything needed to repeat the comparison, and every score behind its numbers."""
    columns = [f"{side}_{name}" for side in SIDES for name in spec.evaluation.scorers]
    return {
        "base": spec.base.model_dump(mode="json"),
        "candidate": spec.candidate.model_dump(mode="json"),
        "evaluation": spec.evaluation.model_dump(mode="json"),
        "conventions": CONVENTIONS,
        "scores": {name: report.model_dump() for name, report in scores.items()},
        "prompts": [
            {"prompt": str(row["prompt"]), **{column: float(row[column]) for column in columns}}
            for row in rows
        ],
    }
