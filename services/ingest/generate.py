"""The generate stage: prompts in, preference pairs of a model's own images out. Draw, score, pair."""

from __future__ import annotations

import time
from typing import Any

from services.api.records import PairsResult
from services.artifacts.prompts import digest_of, read_prompts
from services.errors import BadRequest
from services.ingest import scored
from services.ingest.pairing import Rule, commit, finished, make_pairs
from services.ingest.progress import ScoredImages
from services.ingest.scoring import draw_chunks
from services.stages.journal import Journal
from services.stages.specs import GenerateSpec


def generate(spec: GenerateSpec, journal: Journal) -> PairsResult:
    """Make a dataset, or resume where a killed run stopped.

    Raises BadRequest where the prompts have changed, NonFiniteError where the model or a scorer gives NaN,
    DataError where no pair is left.
    """
    began = time.monotonic()
    result = finished(spec.output)
    if result is None:
        chunks = _chunks(_prompts(spec), spec.generate.images_per_prompt)
        images = spec.generate.num_prompts * spec.generate.images_per_prompt
        done = scored.committed(spec.output)
        progress = ScoredImages(journal, images, sum(_images(spec, chunks[number]) for number in done))
        todo = [chunk for chunk in chunks if chunk["number"] not in done]
        if todo:
            progress.follow(draw_chunks(spec, todo))
        names = tuple(scorer.name for scorer in spec.scorers)
        weights = tuple(spec.generate.scorers[name] for name in names)
        rule = Rule(names, weights, spec.generate.keep, spec.generate.margin)
        result = make_pairs(spec.output, len(chunks), images, rule, spec.actors, journal)
        result = result.model_copy(update={"seconds": time.monotonic() - began})
        commit(spec.output, result)
    message = f"{result.counts.pairs} pairs of {result.images} images for {result.prompts} prompts; "
    message += f"{result.ties} ties, {result.prompts_without_pair} prompts without a pair"
    journal.event(message)
    return result


def _prompts(spec: GenerateSpec) -> list[str]:
    """The prompts that were checked when the dataset was requested."""
    prompts = read_prompts(spec.generate.prompts_uri, spec.generate.num_prompts)
    if digest_of(prompts) != spec.prompts_digest:
        message = (
            f"{spec.generate.prompts_uri!r} has changed since the dataset was requested: request it again"
        )
        raise BadRequest(message, param="generate.prompts_uri", code="prompts_changed")
    return [prompt.text for prompt in prompts]


def _chunks(prompts: list[str], images_per_prompt: int) -> list[dict[str, Any]]:
    """{number, first (the number of the first prompt), prompts} of every chunk."""
    size = max(1, scored.CHUNK_IMAGES // images_per_prompt)
    starts = range(0, len(prompts), size)
    return [
        {"number": number, "first": start, "prompts": prompts[start : start + size]}
        for number, start in enumerate(starts)
    ]


def _images(spec: GenerateSpec, chunk: dict[str, Any]) -> int:
    return len(chunk["prompts"]) * spec.generate.images_per_prompt
