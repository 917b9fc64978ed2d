"""The evaluate stage: draw and score the images of several models, write a report and an image grid."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from dde_core.errors import DataError
from dde_core.image_grid import draw_grid
from services.api.records import EvaluateResult
from services.artifacts.prompts import read_prompts
from services.evaluation import drawing, image_cache, report
from services.evaluation.chunks import Chunk, Scored, base_first, plan
from services.evaluation.progress import Progress
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
    chunks = plan(spec, prompts)
    names = tuple(model.name for model in base_first(spec))
    table = Table(names, tuple(prompts), spec.evaluation.images_per_prompt)
    progress = Progress(spec, chunks, journal)
    stored: dict[Chunk, Scored] = {}
    for scored in drawing.score_chunks(spec, chunks):
        table.add(scored, spec.scorers)
        stored[scored.chunk] = scored
        progress.add(scored)
    progress.end()
    reports = report.compare(table)
    grid_uri = layout.grid_uri(spec.output)
    report_uri = layout.report_uri(spec.output)
    files.write_bytes(grid_uri, _grid(spec, table, stored))
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


def _grid(spec: EvaluateSpec, table: Table, stored: dict[Chunk, Scored]) -> bytes:
    """The image grid as PNG: the first image of each of the first prompts, by all models side by side."""
    shown = [chunk for chunk in stored if chunk.image == 0 and chunk.first < GRID_PROMPTS]
    shown.sort(key=lambda chunk: chunk.first)
    images: list[list[np.ndarray]] = [[] for _ in table.models]
    for chunk, pixels in zip(shown, _images(spec, [stored[chunk] for chunk in shown]), strict=True):
        images[chunk.model] += list(pixels)
    prompts = [prompt.text for prompt in table.prompts[:GRID_PROMPTS]]
    sides = [(name, of_model[:GRID_PROMPTS]) for name, of_model in zip(table.models, images, strict=True)]
    return draw_grid(prompts, sides)


def _images(spec: EvaluateSpec, scored: Sequence[Scored]) -> list[np.ndarray]:
    """The pixels of stored chunks, uint8 [n, h, w, 3] each.

    Chunks that were deleted meanwhile are drawn again. Raises DataError where that does not help.
    """
    found = [_read(each) for each in scored]
    lost = [each.chunk for each, pngs in zip(scored, found, strict=True) if pngs is None]
    if lost:
        again = {each.chunk: each for each in drawing.score_chunks(spec, lost)}
        found = [pngs or _read(again[each.chunk]) for each, pngs in zip(scored, found, strict=True)]
    pixels: list[np.ndarray] = []
    for each, pngs in zip(scored, found, strict=True):
        if pngs is None:
            raise DataError(f"the images at {each.uri} were deleted or damaged twice within this evaluation")
        pixels.append(image_cache.decode_png(pngs))
    return pixels


def _read(scored: Scored) -> list[bytes] | None:
    try:
        return image_cache.read_images(scored.uri)
    except image_cache.Damaged:
        return None
