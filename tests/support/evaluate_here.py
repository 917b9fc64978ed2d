"""The evaluate stage in this process, without a cluster: calls the actor of its pool chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dde_core.config import SampleConfig
from dde_core.generation import TextToImage
from dde_core.shapes import PROMPTS_FILE
from services.api.records import EvaluateResult, ModelRecord
from services.api.requests import EvaluationConfig, ImageFolder
from services.artifacts import models
from services.artifacts.scorers import BUILT_IN
from services.evaluation import drawing
from services.evaluation.chunks import Chunk, Scored
from services.evaluation.evaluate import evaluate
from services.stages.journal import Journal, read_journal
from services.stages.specs import EvaluateSpec
from tests.support.open_sources import EVERYWHERE

SAMPLE = SampleConfig(steps=1, guidance_scale=3.0)


def record_of(name: str, folder: Path) -> ModelRecord:
    """The record of a base model in a folder."""
    uri = folder.as_uri()
    digest = models.folder_digest(uri)
    return ModelRecord(id=f"model_{name}", name=name, uri=uri, family="sd15", digest=digest, created_at=0)


class EvaluateHere:
    """Evaluates into ``root``. ``drawn`` are the prompts of all calls of a model, ``scored`` the chunks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root
        self.runs = 0
        self.drawn: list[str] = []
        self.scored: list[Chunk] = []
        self.order: Any = list
        draw = TextToImage.__call__

        def counted(model: TextToImage, prompts: Sequence[str], *arguments: Any) -> np.ndarray:
            self.drawn += prompts
            return draw(model, prompts, *arguments)

        monkeypatch.setattr(TextToImage, "__call__", counted)
        monkeypatch.setattr(drawing, "score_chunks", self._score_chunks)

    def _score_chunks(self, spec: EvaluateSpec, chunks: Sequence[Chunk]) -> Iterator[Scored]:
        """Replaces the pool of this name in `services.evaluation.drawing`."""
        actor = drawing.ChunkScorer(spec)
        try:
            for chunk in self.order(chunks):
                self.scored.append(chunk)
                yield actor({"chunk": chunk})["scored"]
        finally:
            torch.use_deterministic_algorithms(False)

    def spec(
        self, compared: Sequence[ModelRecord | ImageFolder], base: str = "", **more: Any
    ) -> EvaluateSpec:
        """The spec of a new attempt. ``more`` are fields of the evaluation's config or of the spec, or
        ``records`` of registered scorers.
        """
        self.runs += 1
        prefix = (self.root / "jobs" / f"a{self.runs}").as_uri()
        records = more.pop("records", None)
        fields = {name: more.pop(name) for name in list(more) if name in EvaluationConfig.model_fields}
        given = {"prompts_uri": PROMPTS_FILE.as_uri(), "num_prompts": 4, "sample": SAMPLE, **fields}
        if records is not None:
            given["scorers"] = [record.name for record in records]
        config = EvaluationConfig(**given)
        return EvaluateSpec(
            job="eval_1",
            attempt=self.runs,
            prefix=prefix,
            sources=EVERYWHERE,
            models=list(compared),
            base=base or compared[0].name,
            scorers=[BUILT_IN[name] for name in config.scorers] if records is None else records,
            evaluation=config,
            images=(self.root / "images").as_uri(),
            output=prefix,
            **more,
        )

    def __call__(self, *compared: ModelRecord | ImageFolder, **more: Any) -> EvaluateResult:
        return self.run(self.spec(compared, **more))

    def run(self, spec: EvaluateSpec) -> EvaluateResult:
        """Run the stage. ``drawn`` and ``scored`` begin anew."""
        self.drawn = []
        self.scored = []
        journal = Journal(spec.prefix)
        try:
            return evaluate(spec, journal)
        finally:
            journal.flush()

    def warnings(self) -> list[str]:
        """The warnings of the last run."""
        entries = [each for _, some in read_journal(self._prefix(), 0) for each in some]
        return [str(entry.message) for entry in entries if entry.level == "warning"]

    def metrics(self) -> dict[str, float]:
        """The last metrics of the last run."""
        entries = [each for _, some in read_journal(self._prefix(), 0) for each in some]
        return [entry.metrics for entry in entries if entry.metrics][-1]

    def _prefix(self) -> str:
        return (self.root / "jobs" / f"a{self.runs}").as_uri()

    def stored(self, pattern: str = "*/*.parquet") -> list[Path]:
        """The stored chunks of images and scores."""
        return sorted((self.root / "images").glob(pattern))
