"""Finds the reference ledger that serves a run among the ledgers of its dataset, by their keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

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

OTHER_NOISE: dict[NoiseMode, NoiseMode] = {"independent": "shared", "shared": "independent"}
Mismatches = dict[str, tuple[object, object]]
"""{field: (value of the ledger, value that the run requires)}."""


@dataclass(frozen=True)
class Requirements:
    """A ledger serves a run if it has ``draws`` draws or more under one of the keys in ``choices``.

    Each key comes with the objective that the run has on such a ledger, the preferred one first.
    """

    dataset: str
    draws: int
    choices: tuple[tuple[LedgerKey, ObjectiveConfig], ...]


@dataclass(frozen=True)
class FittingLedger:
    """A ledger that serves the run: the URI of its record, and the objective of the run on this ledger."""

    uri: str
    record: LedgerRecord
    objective: ObjectiveConfig


def requirements_of(spec: LedgerSpec | TrainSpec) -> Requirements:
    """What the run requires of a ledger.

    If the objective sets no noise mode, the method's own comes first and the other one second.
    """
    assert spec.dataset
    with LatentReader(*files.resolve(spec.dataset), spec.training.held_out_pairs) as reader:
        manifest = reader.manifest
        num_pairs = len(reader)
    folder = ModelFolder(*models.fetch(spec.model))
    reference = reference_digest(spec.model)
    modes = [spec.objective.noise_mode]
    if not spec.objective.noise:
        modes.append(OTHER_NOISE[spec.objective.noise_mode])
    objectives = [on_ledger(spec.objective, noise) for noise in modes]
    choices = tuple(
        (LedgerKey.of_run(reference, manifest, folder, objective, spec.training), objective)
        for objective in objectives
    )
    return Requirements(spec.dataset, spec.training.num_draws(num_pairs), choices)


def on_ledger(objective: ObjectiveConfig, noise: NoiseMode) -> ObjectiveConfig:
    """The objective on a ledger of this noise mode.

    A ledger draws t uniformly, so `discounted` weights its losses instead of its draws.
    """
    t_sampling = "uniform" if METHODS[objective.method].discounted else objective.t_sampling
    return replace(objective, noise=noise, t_sampling=t_sampling)


def reference_digest(record: ModelRecord) -> str:
    """The digest of the frozen model: its folder's, and that of the adapters merged into it."""
    return "+".join(each.digest for each in (record.adapter_of, record) if each)


def read(uri: str) -> LedgerRecord:
    """A ledger's record. Raises DataError if it does not exist or cannot be read."""
    try:
        return LedgerRecord.from_json(files.read_bytes(uri))
    except FileNotFoundError as error:
        raise DataError(f"ledger {uri!r} does not exist") from error
    except DataError as error:
        raise DataError(f"ledger {uri!r}: {error}") from error


def _readable(uris: Iterable[str]) -> Iterator[tuple[str, LedgerRecord]]:
    """Skips ledgers that cannot be read, such as another version's: the job does not name them."""
    for uri in uris:
        with suppress(DataError):
            yield uri, read(uri)


def find(required: Requirements) -> FittingLedger | None:
    """The first ledger with all draws under one of the keys.

    A ledger with evaluation points also serves a run that does not read them.
    """
    for choice, objective in required.choices:
        for key in (choice, replace(choice, evaluation_points=True)):
            folder = layout.ledger_folder(required.dataset, key.name)
            names = reversed(list(filter(is_record_name, files.list_files(folder))))
            for uri, record in _readable(files.join(folder, name) for name in names):
                if record.draws >= required.draws:
                    return FittingLedger(uri, record, objective)
    return None


def check(uri: str, required: Requirements) -> FittingLedger:
    """The ledger that the job names. Raises ConfigError with the first field that does not match the run."""
    record = read(uri)
    mismatches, objective = min(_mismatches(record, required), key=_num_mismatches)
    for field, (found, expected) in mismatches.items():
        raise ConfigError(f"ledger.{field}", found, f"must be {expected!r} to match the run")
    return FittingLedger(uri, record, objective)


def nearest_mismatch(required: Requirements) -> str | None:
    """The dataset's ledger with the fewest mismatches, and the fields that differ; None without a ledger."""
    root = layout.ledgers_folder(required.dataset)
    names = files.list_files(root, recursive=True)
    uris = [f"{root}/{name}" for name in names if is_record_name(name.rpartition("/")[2])]
    candidates = [
        (mismatches, uri)
        for uri, record in _readable(uris)
        for mismatches, _ in _mismatches(record, required)
    ]
    if not candidates:
        return f"{uris[0]}, cannot be read" if uris else None
    mismatches, uri = min(candidates, key=_num_mismatches)
    summary = ", ".join(
        f"{field} {found!r} where the run needs {expected!r}"
        for field, (found, expected) in mismatches.items()
    )
    return f"{uri} has {summary}"


def _mismatches(record: LedgerRecord, required: Requirements) -> Iterator[tuple[Mismatches, ObjectiveConfig]]:
    """For each choice of the run: the mismatches and the objective."""
    too_few: Mismatches = {}
    if record.draws < required.draws:
        too_few["draws"] = (record.draws, required.draws)
    for key, objective in required.choices:
        yield record.key.mismatches(key) | too_few, objective


def _num_mismatches(candidate: tuple[Mismatches, object]) -> int:
    return len(candidate[0])
