"""The evaluate stage: draw and score the images of several models, write a report and an image grid."""

from __future__ import annotations

import time

from dde_core.image_grid import draw_grid
from services.api.records import EvaluateResult
from services.artifacts import scorers
from services.artifacts.prompts import read_prompts
from services.evaluation import drawing, report
from services.evaluation.chunks import base_first, plan
from services.evaluation.progress import Progress
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
    _log_truncated(spec, [prompt.text for prompt in prompts], journal)
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
    reports = report.compare(table)
    grid_uri = layout.grid_uri(spec.output)
    report_uri = layout.report_uri(spec.output)
    files.write_bytes(grid_uri, _grid(table, images))
    files.write_json(report_uri, report.as_json(spec, table, reports))
    return EvaluateResult(
        report=report_uri,
        grid=grid_uri,
        base=spec.base,
        num_prompts=len(prompts),
        images_per_prompt=table.images_per_prompt,
        images_drawn=progress.drawn,
        scores=reports,
        seconds=time.monotonic() - began,
    )


def _log_truncated(spec: EvaluateSpec, prompts: list[str], journal: Journal) -> None:
    """Log which scorers read the beginnings of some prompts alone, as their authors do."""
    for record in spec.scorers:
        cut = len(scorers.truncated(record, prompts))
        if cut:
            message = f"{cut} of {len(prompts)} prompts are longer than {record.name} reads"
            journal.event(f"{message}: their ends do not count", "warning")


def _grid(table: Table, images: StoredImages) -> bytes:
    """The image grid as PNG: the first image of each of the first prompts, by all models side by side."""
    prompts = [prompt.text for prompt in table.prompts[:GRID_PROMPTS]]
    rows = range(len(prompts))
    sides = [(name, images.read(model, rows)) for model, name in enumerate(table.models)]
    return draw_grid(prompts, sides)
