"""Which reference ledger serves a run: those beside a dataset's shards, by their keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError, DataError
from dde_core.latents.ledger import LedgerKey, LedgerRecord, is_record_name
from dde_core.latents.reader import LatentReader
from dde_core.methods import METHODS, NoiseMode
from dde_core.models.folder import ModelFolder
from services.api.records import ModelRecord
from services.artifacts import models
from services.stages import layout
from services.stages.specs import LedgerSpec, TrainSpec
from services.storage import files

OTHER: dict[NoiseMode, NoiseMode] = {"independent": "shared", "shared": "independent"}


@dataclass(frozen=True)
class Needed:
    """What a run needs of a ledger: so many draws, under one of these keys. ``choices`` say what the objective is then."""

    dataset: str
    draws: int
    choices: tuple[tuple[LedgerKey, ObjectiveConfig], ...]


@dataclass(frozen=True)
class Found:
    """A ledger that serves the run, by the URI of its record, and the objective with which it does."""

    uri: str
    record: LedgerRecord
    objective: ObjectiveConfig


def needed(spec: LedgerSpec | TrainSpec) -> Needed:
    """A job that names no noise mode takes its method's own, or else the other one. On a ledger t is drawn uniformly."""
    with LatentReader(*files.resolve(spec.dataset), spec.training.held_out_pairs) as reader:
        manifest, num_pairs = reader.manifest, len(reader)
    folder, digest = ModelFolder(*models.fetch(spec.model)), reference_digest(spec.model)
    own = spec.objective.noise_mode
    modes = [own] if spec.objective.noise else [own, OTHER[own]]
    objectives = [on_ledger(spec.objective, noise) for noise in modes]
    keys = [LedgerKey.of_run(digest, manifest, folder, objective, spec.training) for objective in objectives]
    return Needed(spec.dataset, spec.training.num_draws(num_pairs), tuple(zip(keys, objectives, strict=True)))


def on_ledger(objective: ObjectiveConfig, noise: NoiseMode) -> ObjectiveConfig:
    """The objective as it runs on a ledger of this noise: `discounted` weights its losses, since t is drawn uniformly."""
    t_sampling = "uniform" if METHODS[objective.method].discounted else objective.t_sampling
    return replace(objective, noise=noise, t_sampling=t_sampling)


def reference_digest(record: ModelRecord) -> str:
    """The frozen model's: of its folder, and of the adapters that are merged into it."""
    return "+".join(each.digest for each in (record.adapter_of, record) if each)


def read(uri: str) -> LedgerRecord:
    """Raises DataError where there is none, or one that this code cannot read."""
    try:
        return LedgerRecord.from_json(files.read_bytes(uri))
    except FileNotFoundError as error:
        raise DataError(f"ledger {uri!r} is not there") from error
    except DataError as error:
        raise DataError(f"ledger {uri!r}: {error}") from error


def _readable(uris: Iterable[str]) -> Iterator[tuple[str, LedgerRecord]]:
    """Those that can be read: another version's ledger beside a dataset is no concern of a run that was not given it."""
    for uri in uris:
        with suppress(DataError):
            yield uri, read(uri)


def find(request: Needed) -> Found | None:
    """The first ledger that fits and is complete. One that has evaluation points serves those who do not read them too."""
    for key, objective in request.choices:
        for each in (key, replace(key, evaluation_points=True)):
            folder = layout.ledger_folder(request.dataset, each.name)
            names = reversed(list(filter(is_record_name, files.list_files(folder))))
            for uri, record in _readable(files.join(folder, name) for name in names):
                if record.draws >= request.draws:
                    return Found(uri, record, objective)
    return None


def check(uri: str, request: Needed) -> Found:
    """The ledger that was handed over. Raises ConfigError with the field in which it differs from what the run needs."""
    record = read(uri)
    differing, objective = min(_differing(record, request), key=lambda each: len(each[0]))
    for field, (here, there) in differing.items():
        raise ConfigError(f"ledger.{field}", here, f"must be {there!r}, as the run has it")
    return Found(uri, record, objective)


def nearest_misfit(request: Needed) -> str | None:
    """In which fields the nearest of the dataset's ledgers differs from what the run needs, in words."""
    root = layout.ledgers_folder(request.dataset)
    uris = [
        f"{root}/{name}"
        for name in files.list_files(root, recursive=True)
        if is_record_name(name.rpartition("/")[2])
    ]
    mismatches = [
        (differing, uri) for uri, record in _readable(uris) for differing, _ in _differing(record, request)
    ]
    if not mismatches:
        return f"{uris[0]}, cannot be read" if uris else None
    differing, uri = min(mismatches, key=lambda each: len(each[0]))
    summary = ", ".join(
        f"{field} {here!r} where the run needs {there!r}" for field, (here, there) in differing.items()
    )
    return f"{uri} has {summary}"


def _differing(
    record: LedgerRecord, request: Needed
) -> Iterator[tuple[dict[str, tuple[Any, Any]], ObjectiveConfig]]:
    """For each choice of the run: {field: (here, needed)}."""
    few = {"draws": (record.draws, request.draws)} if record.draws < request.draws else {}
    for key, objective in request.choices:
        yield record.key.mismatches(key) | few, objective
