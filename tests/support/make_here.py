"""The stages that make pairs in this process, without a cluster: calls the functions of their pipelines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dde_core.shapes import MODEL_DIR
from services.api.records import ModelRecord, PairsResult
from services.api.requests import DatasetSource, GeneratePairs, Relabel
from services.artifacts import models
from services.artifacts.prompts import digest_of, read_prompts
from services.artifacts.scorers import BUILT_IN
from services.ingest import generate, pairing, relabel, scoring
from services.pairs.source import open_source
from services.pairs.validation import inspect
from services.stages.journal import Journal, read_journal
from services.stages.specs import GenerateSpec, RelabelSpec


class Killed(BaseException):
    """Ends a stage as a signal does."""


class MakeHere:
    """Runs the stages below ``folder``, until ``kill_after`` chunks are committed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setattr(generate, "draw_chunks", self._draw)
        monkeypatch.setattr(relabel, "label_chunks", self._label)
        monkeypatch.setattr(pairing, "pair_chunks", self._pair)
        self.folder = folder
        self.kill_after: int | None = None
        self.scored: list[int] = []
        """The chunks that were scored, by all runs."""
        self.runs = 0

    def _draw(self, spec: GenerateSpec, chunks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        drawer = scoring.Drawer(spec)
        for number, chunk in enumerate(chunks):
            self._survive(number)
            yield self._count(drawer(chunk))

    def _label(self, spec: RelabelSpec, source: Any, work: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        labeler = scoring.Labeler(spec)
        read = (row for piece in work for row in scoring.read_chunks(piece, source))
        for number, row in enumerate(read):
            self._survive(number)
            yield self._count(labeler(row))

    def _pair(self, folder: str, num_chunks: int, rule: Any, spread: Any, actors: int) -> Iterator[Any]:
        for number in range(num_chunks):
            yield pairing.pair_chunk({"number": number}, folder, rule, spread)

    def _survive(self, number: int) -> None:
        if number == self.kill_after:
            raise Killed

    def _count(self, row: dict[str, Any]) -> dict[str, Any]:
        self.scored.append(row["number"])
        return row

    def generate_spec(self, prompts: Path, output: str = "made", **fields: Any) -> GenerateSpec:
        """The spec to draw images of a prompt file's prompts with the shipped model."""
        digest = models.folder_digest(MODEL_DIR.as_uri())
        record = ModelRecord(
            id="m", name="shapes", uri=MODEL_DIR.as_uri(), family="sd15", digest=digest, created_at=0
        )
        wanted = GeneratePairs(model="shapes", prompts_uri=prompts.as_uri(), **fields)
        return GenerateSpec(
            **self._frame(output),
            model=record,
            generate=wanted,
            prompts_digest=digest_of(read_prompts(wanted.prompts_uri, wanted.num_prompts)),
            scorers=[BUILT_IN[name] for name in wanted.scorers],
        )

    def relabel_spec(self, pairs: Path, output: str = "made", **fields: Any) -> RelabelSpec:
        """The spec to label the pairs at a path anew."""
        source = DatasetSource(uri=pairs.as_uri())
        wanted = Relabel(dataset="ds_1", **fields)
        return RelabelSpec(
            **self._frame(output),
            source=source,
            source_digest=inspect(open_source(source)).digest,
            relabel=wanted,
            scorers=[BUILT_IN[wanted.scorer]],
        )

    def _frame(self, output: str) -> dict[str, Any]:
        return {
            "job": "djob",
            "attempt": 1,
            "prefix": (self.folder / "a1").as_uri(),
            "output": (self.folder / output).as_uri(),
        }

    def run(self, spec: GenerateSpec | RelabelSpec) -> PairsResult:
        """One attempt at the stage."""
        self.runs += 1
        spec = spec.model_copy(update={"prefix": (self.folder / f"a{self.runs}").as_uri()})
        stored = json.dumps(spec.model_dump(mode="json"), sort_keys=True)  # as the control plane stores it
        spec = type(spec).model_validate_json(stored)
        journal = Journal(spec.prefix)
        try:
            if isinstance(spec, GenerateSpec):
                return generate.generate(spec, journal)
            return relabel.relabel(spec, journal)
        finally:
            journal.flush()

    def events(self) -> list[str]:
        """The messages of the last run."""
        prefix = (self.folder / f"a{self.runs}").as_uri()
        return [entry.message for _, some in read_journal(prefix, 0) for entry in some if entry.message]
