"""The encode stage in this process, without a cluster: calls the functions of its pipelines one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dde_core.config import DataConfig
from dde_core.models.folder import ModelFolder
from services.api.records import EncodeResult, ModelRecord
from services.api.requests import DatasetSource
from services.artifacts import models
from services.ingest import encode as ingest
from services.ingest.committed import commit
from services.ingest.joining import ShardWork, join_shard
from services.ingest.pipelines import Encoder, segments
from services.ingest.plan import Plan
from services.ingest.reading import read_images
from services.pairs.source import Source, open_source
from services.pairs.validation import inspect
from services.stages.journal import Journal
from services.stages.specs import EncodeSpec


def encode_blocks(
    plan: Plan,
    done: set[int],
    source: Source,
    folder: str,
    model: ModelRecord,
    settings: dict[str, Any],
    *resources: Any,
) -> Iterator[dict[str, Any]]:
    """Replaces the pipeline of this name in `services.ingest.pipelines`."""
    encoder = Encoder(model, settings, "cpu")
    try:
        for work in segments(plan, done, 2):
            for row in read_images(work, source, settings):
                made = encoder({name: np.array([value], dtype=object) for name, value in row.items()})
                yield commit({name: values[0] for name, values in made.items()}, folder)
    finally:
        torch.use_deterministic_algorithms(False)


def join_shards(work: list[ShardWork], actors: int, **shared: Any) -> Iterator[dict[str, Any]]:
    """Replaces the pipeline of this name in `services.ingest.pipelines`."""
    for each in work:
        yield join_shard({"work": each}, **shared)


class EncodeHere:
    """Encodes files of pairs for one model into ``folder``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: ModelFolder, folder: Path) -> None:
        monkeypatch.setattr(ingest, "encode_blocks", encode_blocks)
        monkeypatch.setattr(ingest, "join_shards", join_shards)
        uri = model.path.as_uri()
        digest = models.folder_digest(uri)
        self.folder, self.runs = folder, 0
        self.model = ModelRecord(id="m", name="m", uri=uri, family=model.family, digest=digest, created_at=0)

    def spec(self, path: Path, **data: Any) -> EncodeSpec:
        """The spec of a new attempt."""
        self.runs += 1
        source = DatasetSource(uri=path.as_uri())
        return EncodeSpec(
            job="job",
            attempt=self.runs,
            prefix=(self.folder / f"a{self.runs}").as_uri(),
            source=source,
            source_digest=inspect(open_source(source))[1],
            model=self.model,
            data=DataConfig(**data),
            output=(self.folder / "datasets").as_uri(),
        )

    def __call__(self, path: Path, **data: Any) -> EncodeResult:
        return self.run(self.spec(path, **data))

    @staticmethod
    def run(spec: EncodeSpec) -> EncodeResult:
        journal = Journal(spec.prefix)
        try:
            return ingest.encode(spec, journal)
        finally:
            journal.flush()
