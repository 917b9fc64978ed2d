"""The source of a run's reference errors: a given ledger, a fitting one, or the frozen model each step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from services.artifacts import ledgers
from services.stages import layout
from services.stages.journal import Journal
from services.stages.specs import TrainSpec
from services.storage import files


def resolve(spec: TrainSpec, journal: Journal) -> TrainSpec:
    """The spec with its ledger and the objective as it runs on that, or with ``training.reference`` "online".

    The choice is stored: a resumed run keeps it, even if a ledger has been written since. Raises ConfigError
    if the given ledger does not fit, or if ``training.reference`` is "ledger" and none fits.
    """
    method = METHODS[spec.objective.method]
    if method.on_policy or not method.has_reference:
        return spec.model_copy(update={"ledger": None})
    if spec.training.reference == "online":
        return _online(spec, journal)
    needed = ledgers.requirements_of(spec)
    choice = layout.reference_uri(spec.run)
    if files.exists(choice):
        uri = files.read_json(choice)
        found = ledgers.check(uri, needed) if uri else None
    else:
        found = _find(spec, needed, journal)
        files.write_json(choice, found.uri if found else None)
    return _on_ledger(spec, found, needed.draws, journal) if found else _online(spec, journal)


def _find(spec: TrainSpec, needed: ledgers.Requirements, journal: Journal) -> ledgers.FittingLedger | None:
    if spec.ledger:
        return ledgers.check(spec.ledger, needed)
    found = ledgers.find(needed)
    if found:
        return found
    nearest = ledgers.nearest_mismatch(needed)
    if spec.training.reference == "ledger":
        reason = f"needs a ledger that fits; {nearest or 'the dataset has none'}"
        raise ConfigError("training.reference", "ledger", reason)
    if nearest:
        journal.event(f"no ledger fits; the nearest, {nearest}")
    return None


def _online(spec: TrainSpec, journal: Journal) -> TrainSpec:
    journal.event("reference errors are computed in every step")
    return spec.model_copy(update={"training": replace(spec.training, reference="online"), "ledger": None})


def _on_ledger(spec: TrainSpec, found: ledgers.FittingLedger, draws: int, journal: Journal) -> TrainSpec:
    journal.event(
        f"reference errors from ledger {found.uri}, {draws} draws of each pair, {found.objective.noise} noise"
    )
    if found.objective.noise != spec.objective.noise_mode:
        default = f"the default of method {spec.objective.method!r} is {spec.objective.noise_mode}"
        used = f"this run uses the ledger's {found.objective.noise} noise"
        journal.event(f"{used}; {default}: set objective.noise to force it", "warning")
    if found.objective.t_sampling != spec.objective.t_sampling:
        journal.event("a ledger draws t uniformly: each loss is weighted by p(t)/u(t)")
    training = replace(spec.training, reference="ledger", draws=draws)
    return spec.model_copy(update={"training": training, "objective": found.objective, "ledger": found.uri})


def lineage(spec: TrainSpec) -> dict[str, Any]:
    """The lineage entry of a resolved spec: "none", "online", "rounds", or the ledger with its key."""
    if METHODS[spec.objective.method].on_policy:
        return {"from": "rounds"}
    if spec.ledger is None:
        return {"from": "online" if METHODS[spec.objective.method].has_reference else "none"}
    record = ledgers.read(spec.ledger)
    return {
        "from": "ledger",
        "ledger": spec.ledger,
        "key": record.key.name,
        "draws": spec.training.draws,
        "ledger_draws": record.draws,
        "noise": record.noise,
    }
