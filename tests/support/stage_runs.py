"""Stages of jobs as processes, each by the entry point that a job uses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dde_core.shapes import MODEL_DIR
from services.api.records import ModelRecord, Stage
from services.api.requests import DatasetSource, Strict
from services.artifacts import models
from services.client.local import LocalSystem
from services.client.processes import environment
from services.pairs.source import open_source
from services.pairs.validation import inspect
from services.stages.journal import read_journal
from services.stages.specs import ENTRY_MODULES, RESULTS, EncodeSpec, StageSpec
from services.storage import files
from tests.support.open_sources import EVERYWHERE


def cluster_environment(system: LocalSystem) -> dict[str, str]:
    """The environment of a driver on a system's cluster."""
    address = f"127.0.0.1:{system.ray.ports.gcs}"
    return environment(
        str(system.state), {"RAY_ADDRESS": address, "RAY_TRAIN_V2_ENABLED": "1", **system.ray.auth}
    )


def shapes_record() -> ModelRecord:
    """The record of the shipped model."""
    uri = MODEL_DIR.as_uri()
    digest = models.folder_digest(uri)
    return ModelRecord(id="model_base", name="shapes", uri=uri, family="sd15", digest=digest, created_at=0)


class Running:
    """A stage's driver process."""

    def __init__(self, process: subprocess.Popen, stage: Stage, prefix: str) -> None:
        self.process = process
        self.stage = stage
        self.prefix = prefix

    def finish(self, timeout_s: float = 240.0) -> Any:
        """Wait until the stage succeeds; return its result from done.json."""
        assert self.process.wait(timeout_s) == 0, self.failure()
        result: Strict = RESULTS[self.stage].model_validate_json(
            files.read_bytes(files.join(self.prefix, "done.json"))
        )
        return result

    def failure(self) -> str:
        """The text of failed.json, if it exists."""
        uri = files.join(self.prefix, "failed.json")
        return files.read_bytes(uri).decode() if files.exists(uri) else "no failed.json"

    def events(self) -> list[str]:
        return [entry.message for _, some in read_journal(self.prefix, 0) for entry in some if entry.message]


class StageRuns:
    """Starts stages that store their files below ``root``. ``env`` is the drivers' environment."""

    def __init__(self, root: Path | str, env: Mapping[str, str]) -> None:
        self.root, self.env = files.as_uri(root), dict(env)

    def prefix(self, name: str) -> str:
        return files.join(self.root, name)

    def frame(self, name: str) -> dict[str, Any]:
        """The fields that every spec of this name has."""
        return {"job": name, "attempt": 1, "prefix": self.prefix(name), "sources": EVERYWHERE}

    def encode_spec(self, name: str, uri: str, model: ModelRecord, **more: Any) -> EncodeSpec:
        """The spec to encode the pairs at ``uri``, as they are now, into ``{root}/datasets``."""
        source = DatasetSource(uri=uri)
        digest, output = inspect(open_source(source))[1], files.join(self.root, "datasets")
        given = {
            **self.frame(name),
            "source": source,
            "source_digest": digest,
            "model": model,
            "output": output,
        }
        return EncodeSpec(**{**given, **more})

    def start(self, stage: Stage, spec: StageSpec) -> Running:
        uri = files.join(spec.prefix, "spec.json")
        files.write_json(uri, spec.model_dump(mode="json"))
        command = [sys.executable, "-m", *ENTRY_MODULES[stage].split(), "--spec", uri]
        return Running(subprocess.Popen(command, env=self.env), stage, spec.prefix)
