"""The evaluate stage: draw and score the images of several models, write a report and an image grid."""

from __future__ import annotations

import time

from dde_core.image_grid import draw_grid
from services.api.records import DriftResult, EvaluateResult, ScorerReport
from services.api.reports import EvaluationReport
from services.artifacts import scorers
from services.artifacts.prompts import read_prompts
from services.evaluation import drawing, html
from services.evaluation.chunks import base_first, plan
from services.evaluation.progress import Progress
from services.evaluation.provenance import provenance
from services.evaluation.report import compare
from services.evaluation.stored_images import StoredImages
from services.evaluation.table import Table
from services.stages import layout
from services.stages.journal import Journal
from services.stages.specs import EvaluateSpec
from services.storage import files

GRID_PROMPTS = 16


def evaluate(spec: EvaluateSpec, journal: Journal) -> EvaluateResult:
    """Draw, score and compare; a killed run's images and scores are used again.

    Raises BadRequest for prompts or images drawn elsewhere that are not all there, and for models whose
    images differ in size.
    """
    began = time.monotonic()
    prompts = read_prompts(spec.evaluation.prompts_uri, spec.evaluation.num_prompts)
    truncated = _log_truncated(spec, [prompt.text for prompt in prompts], journal)
    chunks = plan(spec, prompts)
    names = tuple(model.name for model in base_first(spec))
    table = Table(names, tuple(prompts), spec.evaluation.images_per_prompt)
    progress = Progress(spec, chunks, journal)
    images = StoredImages(spec)
    for scored in drawing.score_chunks(spec, chunks):
        table.add(scored, spec.scorers)
        images.add(scored)
        progress.add(scored)
    progress.end()
    scores = table.score_table(spec.scorers, truncated)
    found = compare(scores, spec.evaluation.compare, provenance(spec))
    report_uri = layout.report_uri(spec.output)
    page_uri = layout.page_uri(spec.output)
    grid_uri = layout.grid_uri(spec.output)
    files.write_bytes(grid_uri, _grid(table, images))
    files.write_bytes(page_uri, html.render(found, images.png).encode())
    files.write_json(report_uri, found.model_dump(mode="json"))
    return EvaluateResult(
        report=report_uri,
        page=page_uri,
        grid=grid_uri,
        summary=[each.sentence for each in found.summary],
        base=spec.base,
        num_prompts=len(prompts),
        images_per_prompt=table.images_per_prompt,
        images_drawn=progress.drawn,
        scores=_scores(found),
        drift=_drift(found),
        seconds=time.monotonic() - began,
    )


def _scores(report: EvaluationReport) -> dict[str, dict[str, ScorerReport]]:
    """Each scorer's numbers of each candidate."""
    scores: dict[str, dict[str, ScorerReport]] = {}
    for each in report.comparisons:
        scores.setdefault(each.scorer, {})[each.candidate] = ScorerReport(
            base=each.base,
            candidate=each.mean,
            difference=each.difference,
            beat_ratio=each.beat_ratio,
            verdict=each.verdict,
        )
    return scores


def _drift(report: EvaluationReport) -> dict[str, dict[str, DriftResult]]:
    drift: dict[str, dict[str, DriftResult]] = {}
    for each in report.drift:
        result = DriftResult(value=each.value, limit=each.limit, is_beyond=each.is_beyond)
        drift.setdefault(each.scorer, {})[each.candidate] = result
    return drift


def _log_truncated(spec: EvaluateSpec, prompts: list[str], journal: Journal) -> set[int]:
    """Log which scorers read the beginnings of some prompts alone, as their authors do. Returns those
    prompts' numbers.
    """
    truncated: set[int] = set()
    for record in spec.scorers:
        cut = scorers.truncated(record, prompts)
        truncated.update(cut)
        if cut:
            message = f"{len(cut)} of {len(prompts)} prompts are longer than {record.name} reads"
            journal.event(f"{message}: their ends do not count", "warning")
    return truncated


def _grid(table: Table, images: StoredImages) -> bytes:
    """The image grid as PNG: the first image of each of the first prompts, by all models side by side."""
    prompts = [prompt.text for prompt in table.prompts[:GRID_PROMPTS]]
    rows = range(len(prompts))
    sides = [(name, images.read(model, rows)) for model, name in enumerate(table.models)]
    return draw_grid(prompts, sides)
