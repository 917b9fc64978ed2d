"""The relabel stage: a dataset's pairs in, the same pairs with a scorer's labels out. Read, score, pair."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from services.api.records import PairsResult
from services.ingest import scored
from services.ingest.pairing import Rule, commit, finished, make_pairs
from services.ingest.progress import ScoredImages
from services.ingest.scoring import READERS_PER_ACTOR, Chunk, label_chunks
from services.pairs.columnar import Unit
from services.pairs.source import Source, open_source
from services.pairs.validation import RowTally, Summary
from services.stages.journal import Journal
from services.stages.specs import RelabelSpec

Plan = list[tuple[Unit, list[Chunk]]]


def relabel(spec: RelabelSpec, journal: Journal) -> PairsResult:
    """Label a dataset anew, or resume where a killed run stopped.

    Raises BadRequest where the dataset has changed, NonFiniteError where the scorer gives NaN, DataError for
    images that it cannot score and where no pair is left.
    """
    began = time.monotonic()
    result = finished(spec.output)
    if result is None:
        source = open_source(spec.source)
        plan, tally, pairs = _plan(spec, source)
        chunks = [chunk for _, of_unit in plan for chunk in of_unit]
        done = scored.committed(spec.output)
        num_done = sum(2 * _pairs(chunks, number, pairs) for number in done)
        progress = ScoredImages(journal, 2 * pairs, num_done)
        work = _segments(plan, done, READERS_PER_ACTOR * spec.actors)
        if work:
            progress.follow(label_chunks(spec, source, work))
        rule = Rule((spec.relabel.scorer,), (1.0,), "all_pairs", spec.relabel.margin)
        result = make_pairs(spec.output, len(chunks), 2 * pairs, rule, spec.actors, journal)
        bad = dict(sorted((tally.bad + Counter(result.bad)).items()))
        result = result.model_copy(update={"bad": bad, "seconds": time.monotonic() - began})
        commit(spec.output, result)
    message = f"{result.counts.pairs} pairs labeled by {spec.relabel.scorer}, {result.ties} ties; "
    journal.event(f"{message}it agrees with the labels of the dataset on {result.agreement or 0:.1%}")
    if result.bad:
        journal.event(f"left out, because they cannot be used: {result.bad}", "warning")
    return result


def _plan(spec: RelabelSpec, source: Source) -> tuple[Plan, RowTally, int]:
    """The chunks of every unit, the rows by kind and the number of decided pairs.

    One pass over the rows without images.

    Raises BadRequest where they differ from those that were registered.
    """
    summary = Summary(source)
    plan: Plan = []
    number = pairs = 0
    for unit in source.units():
        chunks: list[Chunk] = []
        start = 0
        first = pairs
        row = -1
        for row, each in enumerate(summary.observe(source.rows(unit))):
            pairs += len(each.preferences)
            if 2 * (pairs - first) >= scored.CHUNK_IMAGES:
                chunks.append(Chunk(number, start, row + 1, first))
                number += 1
                start, first = row + 1, pairs
        if pairs > first:
            chunks.append(Chunk(number, start, row + 1, first))
            number += 1
        if chunks:
            plan.append((unit, chunks))
    summary.check_digest(spec.source_digest, "relabel.dataset")
    return plan, summary.tally, pairs


def _pairs(chunks: list[Chunk], number: int, total: int) -> int:
    """How many decided pairs a chunk has."""
    end = chunks[number + 1].first if number + 1 < len(chunks) else total
    return end - chunks[number].first


def _segments(plan: Plan, done: set[int], readers: int) -> list[dict[str, Any]]:
    """The chunks to score, in pieces of a unit that are read independently: {unit, chunks}.

    A unit may be decoded from its beginning, so it is split only where units are too few for the readers.
    """
    pending = [(unit, [chunk for chunk in chunks if chunk.number not in done]) for unit, chunks in plan]
    pending = [(unit, chunks) for unit, chunks in pending if chunks]
    parts = -(-2 * readers // max(1, len(pending)))
    work: list[dict[str, Any]] = []
    for unit, chunks in pending:
        length = -(-len(chunks) // parts)
        pieces = [chunks[start : start + length] for start in range(0, len(chunks), length)]
        work += [{"unit": unit, "chunks": piece} for piece in pieces]
    return work
