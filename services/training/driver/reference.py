"""Where a run's reference errors come from: a ledger that was handed over or found, or the frozen model in every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dde_core.errors import ConfigError
from dde_core.objectives import OBJECTIVES
from services.artifacts import ledgers
from services.stages.journal import Journal
from services.stages.specs import TrainSpec
from services.storage import files

CHOSEN = "reference.json"
"""Beside a run's checkpoints: a run that goes on stays with what it began with, whatever has been written since."""


def resolve(spec: TrainSpec, journal: Journal) -> TrainSpec:
    """The spec as it runs: with the ledger and the objective, or ``training.reference`` "online".

    Raises ConfigError for a ledger that was handed over and does not fit, and where one is asked for and there is none.
    """
    if not OBJECTIVES[spec.objective.method].preference:
        return spec.model_copy(update={"ledger": None})
    if spec.training.reference == "online":
        return _online(spec, journal)
    chosen, asked = files.join(spec.run, CHOSEN), ledgers.needed(spec)
    if files.exists(chosen):
        before = files.read_json(chosen)
        found = ledgers.check(before, asked) if before else None
    else:
        found = _found(spec, asked, journal)
        files.write_json(chosen, found.uri if found else None)
    return _on_ledger(spec, found, asked.draws, journal) if found else _online(spec, journal)


def _found(spec: TrainSpec, asked: ledgers.Needed, journal: Journal) -> ledgers.Found | None:
    if spec.ledger:
        return ledgers.check(spec.ledger, asked)
    found = ledgers.find(asked)
    nearest = None if found else ledgers.nearest_misfit(asked)
    if found is None and spec.training.reference == "ledger":
        raise ConfigError(
            "training.reference", "ledger", f"needs a ledger that fits; {nearest or 'the dataset has none'}"
        )
    if nearest:
        journal.event(f"no ledger fits; the nearest, {nearest}")
    return found


def _online(spec: TrainSpec, journal: Journal) -> TrainSpec:
    journal.event("reference errors are computed in every step")
    return spec.model_copy(update={"training": replace(spec.training, reference="online"), "ledger": None})


def _on_ledger(spec: TrainSpec, found: ledgers.Found, draws: int, journal: Journal) -> TrainSpec:
    journal.event(
        f"reference errors from ledger {found.uri}, {draws} draws of each pair, {found.objective.noise} noise"
    )
    if found.objective.noise != spec.objective.noise_mode:
        own = f"method {spec.objective.method!r} has {spec.objective.noise_mode} noise of its own"
        followed = f"this run follows the ledger's {found.objective.noise} noise"
        journal.event(f"{followed}; {own}: set objective.noise to ask for it", "warning")
    if found.objective.t_sampling != spec.objective.t_sampling:
        journal.event("a ledger draws t uniformly: each loss is weighted by p(t)/u(t)")
    training = replace(spec.training, reference="ledger", draws=draws)
    return spec.model_copy(update={"training": training, "objective": found.objective, "ledger": found.uri})


def lineage(spec: TrainSpec) -> dict[str, Any]:
    """What is recorded of a resolved spec: where the errors came from, and of a ledger its key and what its noise was."""
    if spec.ledger is None:
        return {"from": "online" if OBJECTIVES[spec.objective.method].preference else "none"}
    record = ledgers.read(spec.ledger)
    return {
        "from": "ledger",
        "ledger": spec.ledger,
        "key": record.key.name,
        "draws": spec.training.draws,
        "ledger_draws": record.draws,
        "noise": record.noise,
    }
