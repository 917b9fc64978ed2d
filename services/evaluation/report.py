"""The report of an evaluation: each candidate against the base, and every number behind that."""

from __future__ import annotations

from typing import Any

import numpy as np

from dde_core.metrics import Difference, Estimate, beat_ratio, paired_difference
from services.api.records import Interval, ScorerReport
from services.evaluation.chunks import base_first
from services.evaluation.table import Table
from services.stages.specs import EvaluateSpec

CONVENTIONS = (
    "sampler DDIM, eta 0; seed of image j of prompt i is seed + i + 100000 j; a prompt counts once, by the "
    "mean of its images' scores; ties count half; intervals: 95% over prompts"
)


def compare(table: Table) -> dict[str, dict[str, ScorerReport]]:
    """The numbers of each candidate against the base, by scorer and candidate."""
    reports: dict[str, dict[str, ScorerReport]] = {}
    for scorer, scores in table.scores.items():
        base, *candidates = scores.mean(axis=2)
        reports[scorer] = {
            name: _compare_scores(base, candidate)
            for name, candidate in zip(table.models[1:], candidates, strict=True)
        }
    return reports


def as_json(spec: EvaluateSpec, table: Table, reports: dict[str, dict[str, ScorerReport]]) -> dict[str, Any]:
    """Everything needed to repeat the comparison, and every score behind its numbers."""
    return {
        "models": [model.model_dump(mode="json") for model in base_first(spec)],
        "base": spec.base,
        "evaluation": spec.evaluation.model_dump(mode="json"),
        "scorers": [scorer.model_dump(mode="json") for scorer in spec.scorers],
        "conventions": CONVENTIONS,
        "scores": {
            scorer: {name: report.model_dump() for name, report in of_scorer.items()}
            for scorer, of_scorer in reports.items()
        },
        "categories": _categories(table),
        "prompts": [
            {
                "prompt": prompt.text,
                "category": prompt.category,
                "scores": {
                    scorer: dict(zip(table.models, scores[:, i].tolist(), strict=True))
                    for scorer, scores in table.scores.items()
                },
            }
            for i, prompt in enumerate(table.prompts)
        ],
    }


def _compare_scores(base: np.ndarray, candidate: np.ndarray) -> ScorerReport:
    """From the mean score of each prompt: images of one prompt are not independent, prompts are."""
    return ScorerReport(
        base=float(base.mean()),
        candidate=float(candidate.mean()),
        difference=_interval(paired_difference(candidate, base)),
        beat_ratio=_interval(beat_ratio(candidate, base)),
    )


def _interval(found: Difference | Estimate) -> Interval:
    return Interval(value=found.value, low=found.low, high=found.high)


def _categories(table: Table) -> dict[str, Any]:
    """The number of prompts of each category, and each model's mean score on them."""
    names = sorted({prompt.category for prompt in table.prompts if prompt.category is not None})
    found: dict[str, Any] = {}
    for name in names:
        rows = [i for i, prompt in enumerate(table.prompts) if prompt.category == name]
        means = {
            scorer: dict(zip(table.models, scores[:, rows].mean(axis=(1, 2)).tolist(), strict=True))
            for scorer, scores in table.scores.items()
        }
        found[name] = {"prompts": len(rows), "scores": means}
    return found
