"""The report of a study: contrasts between its settings, what each has cost, and their learning curves."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from dde_core.scorers.kinds import KINDS
from dde_core.study import seed_contrasts, seed_values_contrast
from dde_core.verdict import holm
from services.api.records import (
    Contrast,
    EvaluateResult,
    Interval,
    StudyCellRecord,
    StudyReport,
    StudySetting,
)
from services.api.study_cells import is_seed, seeds_of
from services.control import stages, study_page
from services.control.tables import Job, Metric
from services.settings import Settings
from services.stages import layout
from services.storage import files

MOST_PAIRED = 12
"""With more settings than these, each is compared with the base alone."""
CURVE_POINTS = 100
CONVENTIONS = (
    "difference: mean over seeds and prompts of the scores of one setting less those of the other, from the "
    "same seed; the wider of the crossed bootstrap over seeds and prompts and Student's interval over seeds, "
    "95%; of a single seed: over prompts alone; drift (lower is better): between two settings, as it is "
    "from the base already, Student's interval over at least two seeds; adjusted p: Holm over all contrasts"
)

Scores = dict[str, dict[str, list[float]]]
"""The score of each prompt, by scorer and model."""
Drifts = dict[str, dict[str, float]]
"""How far each model's images are from the base's, by scorer and model."""
Curves = dict[str, dict[str, list[tuple[int, float]]]]
"""Steps and values, by metric and cell."""


@dataclass(frozen=True)
class CellRun:
    """A cell with the row of its job (None: none was created), and its seeds."""

    cell: StudyCellRecord
    job: Job | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class _Shared:
    """Two settings, or one and the base (``against`` None), with the ids of their models of each seed."""

    setting: str
    against: str | None
    models: tuple[tuple[str, str], ...]


def write(
    session: Session,
    study: Job,
    cells: Sequence[StudyCellRecord],
    settings: Settings,
) -> StudyReport:
    """Compute the report and write it to storage, as JSON and as a page. Repeated, it writes the same."""
    numbers = [cell.job for cell in cells if cell.job]
    rows = _rows(session, numbers)
    bodies = study.inputs["bodies"]
    runs = [CellRun(cell, rows.get(cell.job or ""), seeds_of(bodies[cell.label])) for cell in cells]
    curves = {run.cell.label: _curves(session, run) for run in runs}
    evaluations = list(_rows(session, study.results["evaluations"]).values())
    results = [_result(row) for row in evaluations]
    scores, drifts = _scores(evaluations)
    compared = {run.cell.label: run for run in runs if run.cell.model in study.results["compared"]}
    root = stages.root(study, settings)
    report = StudyReport(
        report=layout.study_report_uri(root, study.id),
        page=layout.study_page_uri(root, study.id),
        base_scores={name: float(np.mean(each[str(study.base)])) for name, each in scores.items()},
        settings=_settings(runs, scores, drifts, compared, curves),
        contrasts=_contrasts(list(compared.values()), scores, drifts, str(study.base)),
        seconds=sum(result.seconds for result in results),
        images=sum(result.images_drawn for result in results),
    )
    by_metric = _by_metric(curves)
    content = {
        **report.model_dump(mode="json", exclude={"report", "page"}),
        "study": study.id,
        "request": study.request,
        "cells": [cell.model_dump(mode="json") for cell in cells],
        "evaluations": [result.report for result in results],
        "conventions": CONVENTIONS,
        "curves": by_metric,
    }
    files.write_json(report.report, content)
    settings_of = {cell.label: cell.setting for cell in cells}
    page = study_page.page(str(study.name), report, by_metric, settings_of, CONVENTIONS)
    files.write_bytes(report.page, page.encode())
    return report


def _rows(session: Session, numbers: Sequence[str]) -> dict[str, Job]:
    """Jobs by id, in the order of their creation."""
    query = select(Job).where(Job.id.in_(numbers)).order_by(Job.seq)
    return {row.id: row for row in session.scalars(query)}


def _result(row: Job) -> EvaluateResult:
    return EvaluateResult.model_validate_json(json.dumps(row.results["evaluate"]))


def _scores(evaluations: Sequence[Job]) -> tuple[Scores, Drifts]:
    """The scores of every model, by its id, from the evaluations' reports: means over a prompt's images.

    Scorers that compare all images of two models have one number for each of the others.
    """
    found: Scores = {}
    drifts: Drifts = {}
    for row in evaluations:
        report = files.read_json(_result(row).report)
        numbers = {each["name"]: each["id"] for each in row.inputs["models"]}
        for scorer, of_models in report["scores"].items():
            if KINDS[report["kinds"][scorer]].level == "model":
                base = report["models"][0]
                measured = zip(report["models"], of_models, strict=True)
                of_scorer = {numbers[name]: float(value) for name, value in measured if name != base}
                drifts.setdefault(scorer, {}).update(of_scorer)
                continue
            for name, of_prompts in zip(report["models"], of_models, strict=True):
                means = [float(np.mean(of_prompt)) for of_prompt in of_prompts]
                found.setdefault(scorer, {})[numbers[name]] = means
    return found, drifts


def _settings(
    runs: Sequence[CellRun],
    scores: Scores,
    drifts: Drifts,
    compared: Mapping[str, CellRun],
    curves: Mapping[str, Mapping[str, list[tuple[int, float]]]],
) -> list[StudySetting]:
    settings = []
    for name in dict.fromkeys(run.cell.setting for run in runs):
        members = [run for run in runs if run.cell.setting == name]
        models = [str(run.cell.model) for run in members if run.cell.label in compared]
        means = {}
        if models:
            by_scorer: dict[str, Mapping[str, Any]] = {**scores, **drifts}
            means = {
                scorer: float(np.mean([each[model] for model in models]))
                for scorer, each in by_scorer.items()
            }
        seconds: Counter[str] = Counter()
        for run in members:
            seconds.update(run.job.stage_seconds if run.job else {})
        overrides = {
            fields: value for fields, value in members[0].cell.overrides.items() if not is_seed(fields)
        }
        settings.append(
            StudySetting(
                setting=name,
                overrides=overrides,
                cells=len(members),
                models=len(models),
                scores=means,
                seconds=dict(seconds),
                images=sum(_images(run, curves[run.cell.label]) for run in members),
            )
        )
    return settings


def _images(run: CellRun, curves: Mapping[str, list[tuple[int, float]]]) -> int:
    """What the job's own evaluation and the validations of its checkpoints have drawn."""
    if run.job is None:
        return 0
    count = _result(run.job).images_drawn if "evaluate" in run.job.results else 0
    validation = run.job.request.get("validation")
    if validation:
        scorers = run.job.request["evaluation"]["scorers"]
        count += validation["num_prompts"] * max((len(curves.get(name, ())) for name in scorers), default=0)
    return count


def _contrasts(compared: Sequence[CellRun], scores: Scores, drifts: Drifts, base: str) -> list[Contrast]:
    """Every setting against the base, and every two settings by the seeds that both have.

    Drift is contrasted between two settings of at least two seeds.
    """
    by_setting: dict[str, dict[tuple[int, ...], str]] = {}
    for run in compared:
        by_setting.setdefault(run.cell.setting, {})[run.seeds] = str(run.cell.model)
    pairs: list[tuple[str, str | None]] = [(setting, None) for setting in by_setting]
    if len(by_setting) <= MOST_PAIRED:
        pairs += itertools.combinations(by_setting, 2)
    shared = [each for each in (_shared(by_setting, base, *pair) for pair in pairs) if each.models]
    named: list[tuple[str, _Shared]] = []
    tables: list[np.ndarray] = []
    for scorer, of_scorer in scores.items():
        for each in shared:
            named.append((scorer, each))
            tables.append(np.array([np.subtract(of_scorer[a], of_scorer[b]) for a, b in each.models]))
    found = seed_contrasts(tables)
    for scorer, drift in drifts.items():
        for each in shared:
            if each.against is not None and len(each.models) > 1:
                named.append((scorer, each))
                found.append(seed_values_contrast(np.array([drift[a] - drift[b] for a, b in each.models])))
    num_prompts = len(next(iter(next(iter(scores.values())).values()))) if scores else 0
    adjusted = holm([each.p for each in found])
    return [
        Contrast(
            scorer=scorer,
            setting=each.setting,
            against=each.against,
            seeds=len(each.models),
            prompts=num_prompts,
            difference=Interval(value=contrast.value, low=contrast.low, high=contrast.high),
            by=contrast.by,
            p=contrast.p,
            adjusted_p=adjusted_p,
        )
        for (scorer, each), contrast, adjusted_p in zip(named, found, adjusted, strict=True)
    ]


def _shared(
    by_setting: Mapping[str, Mapping[tuple[int, ...], str]], base: str, setting: str, against: str | None
) -> _Shared:
    """The models of two settings, or of one and the base, by the seeds that both have."""
    models = by_setting[setting]
    others = dict.fromkeys(models, base) if against is None else by_setting[against]
    seeds = sorted(models.keys() & others.keys())
    return _Shared(setting, against, tuple((models[seed], others[seed]) for seed in seeds))


def _curves(session: Session, run: CellRun) -> dict[str, list[tuple[int, float]]]:
    """Loss, held-out accuracy, reward of rollouts and validation's scores of a cell, by steps of training."""
    if run.job is None:
        return {}
    names = ("loss", "held_out_accuracy", "rollout_reward", *run.job.request["evaluation"]["scorers"])
    query = select(Metric.step, Metric.values).where(Metric.job == run.job.id, Metric.stage == "train")
    rows = session.execute(query.order_by(Metric.step)).all()
    curves = {name: [(step, values[name]) for step, values in rows if name in values] for name in names}
    return {name: curve for name, curve in curves.items() if curve}


def _by_metric(curves: Mapping[str, Mapping[str, list[tuple[int, float]]]]) -> Curves:
    found: Curves = {}
    for label, of_cell in curves.items():
        for metric, curve in of_cell.items():
            found.setdefault(metric, {})[label] = _thinned(curve)
    return found


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most CURVE_POINTS points: means of as many steps each."""
    if len(curve) <= CURVE_POINTS:
        return curve
    parts = np.array_split(np.array(curve), CURVE_POINTS)
    return [(int(part[-1, 0]), float(part[:, 1].mean())) for part in parts]
