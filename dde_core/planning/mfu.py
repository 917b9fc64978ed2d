"""Model FLOPs utilization (MFU): which fraction of a GPU's peak training reaches. Imports no torch.

An MFU comes from the hours of a published run, or from a measured step of `tests/bench/gpu_step.py`. A number
fitted to one run proves nothing by reproducing that run, so `checks` predicts others: each Diffusion-DPO run
from the other's MFU (or both from a measured one), and MosaicML's precompute, which runs the VAE only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.planning.estimate import pair_flops, public_recipe_flops, published_mfu
from dde_core.planning.facts import BENCHED, FACTS, GPUS, PRECOMPUTES

A100 = GPUS["a100"]
MEASURED = re.compile(
    r"(?P<family>\w+) at \d+ px, bf16, micro (?P<micro>\d+), "
    r"(?P<checkpointing>with|without) gradient checkpointing(?P<compiled>, compiled)?, train_vs_public_recipe"
)
"""Names of entries of `python -m tests.bench.gpu_step --out FILE`: ``value`` is our pairs/s on a ledger,
``ratio`` how many times the public recipe's on the same GPU."""

UNIFORM = ObjectiveConfig(method="uniform")


@dataclass(frozen=True, kw_only=True)
class Mfu:
    """``value`` is a fraction of a GPU's dense bf16 peak, ``source`` says for people where it comes from.
    ``family`` is the model whose published hours it was fitted to, None if it was measured."""

    value: float
    source: str
    family: str | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """A prediction for a run from a number taken elsewhere, and the known value."""

    name: str
    source: str
    predicted: float
    known: float
    unit: str

    @property
    def ratio(self) -> float:
        return self.predicted / self.known


def published(family: str) -> Mfu:
    """MFU of Diffusion-DPO's published run of this family. Raises ConfigError for an unknown family."""
    if family not in FACTS:
        raise ConfigError("family", family, f"must be one of {', '.join(FACTS)}")
    facts = FACTS[family]
    source = f"Diffusion-DPO's {facts.published.gpu_hours:,.0f} A100-hours, {family}"
    return Mfu(value=published_mfu(facts), source=source, family=family)


def measured(results: Mapping[str, Any], family: str, gpu: str, training: TrainConfig) -> Mfu | None:
    """MFU of the fastest measured step of this family, or None without one on a known GPU.

    Prefers a step on this GPU, then one with the same gradient checkpointing, then one with the same
    compilation. Raises ConfigError for a value that is no speed.
    """
    found = []
    for name, entry in _measured(results):
        if entry["family"] != family:
            continue
        pairs_per_s = _positive(results, name, "value")
        measured_on = gpu_of(str(results[name].get("machine")))
        if measured_on is None:
            continue
        checkpointed = entry["checkpointing"] == "with"
        value = pairs_per_s * ledger_step_flops(family, checkpointed) / GPUS[measured_on].peak
        how = f"micro {entry['micro']}, {entry['checkpointing']} checkpointing{entry['compiled'] or ''}"
        source = f"measured: {pairs_per_s:.4g} pairs/s of {family} on an {GPUS[measured_on].title}, {how}"
        preference = (
            measured_on == gpu,
            checkpointed == training.gradient_checkpointing,
            bool(entry["compiled"]) == training.compile,
        )
        found.append((*preference, value, source))
    if not found:
        return None
    *_, value, source = max(found)
    return Mfu(value=value, source=source)


def _measured(results: Mapping[str, Any]) -> Iterator[tuple[str, re.Match[str]]]:
    for name in results:
        entry = MEASURED.fullmatch(name)
        if entry:
            yield name, entry


def gpu_of(machine: str) -> str | None:
    """The key of the known GPU that a name such as "NVIDIA H100 80GB HBM3" contains."""
    return next((name for name in GPUS if name in machine.lower()), None)


def ledger_step_flops(family: str, checkpointing: bool) -> float:
    """FLOPs of a pair in a training step on a ledger."""
    training = TrainConfig(reference="ledger", gradient_checkpointing=checkpointing)
    return pair_flops(FACTS[family], UNIFORM, training)


def checks(mfu: Mfu) -> Iterator[Check]:
    """A100-hours of published runs, predicted from an MFU that was not fitted to them."""
    yield from training_checks(mfu)
    yield from encoding_checks(mfu)


def training_checks(mfu: Mfu) -> Iterator[Check]:
    """Diffusion-DPO's runs. A fitted MFU would reproduce its own run, so each is predicted from the other
    families'."""
    for family, facts in FACTS.items():
        others = [mfu] if mfu.family is None else [published(name) for name in FACTS if name != family]
        for other in others:
            yield Check(
                name=f"Diffusion-DPO, {facts.title}",
                source=other.source,
                predicted=facts.published.gpu_hours * published_mfu(facts) / other.value,
                known=facts.published.gpu_hours,
                unit="A100-hours",
            )


def encoding_checks(mfu: Mfu) -> Iterator[Check]:
    """MosaicML's precompute, under both readings."""
    for run in PRECOMPUTES:
        hours = run.gpu_hours * run.images_per_s * run.vae_flops / (mfu.value * A100.peak)
        yield Check(
            name=run.title, source=mfu.source, predicted=hours, known=run.gpu_hours, unit="A100-hours"
        )


def ceilings(family: str) -> Iterator[tuple[bool, float, float]]:
    """(gradient checkpointing, FLOPs of a pair here on a ledger, FLOPs of a pair in the public recipe), with
    and without.

    Their quotient is the speed-up over the public recipe at equal MFU.
    """
    for checkpointing in (True, False):
        passes = 5 if checkpointing else 4
        yield (
            checkpointing,
            ledger_step_flops(family, checkpointing),
            public_recipe_flops(FACTS[family], passes),
        )


def benchmarks(results: Mapping[str, Any]) -> Iterator[Check]:
    """Measured ratios beside what FLOPs alone predict: a run on a ledger against one with the reference in
    every step, and against the public recipe, in `make bench` and on a GPU."""
    for name in sorted(results):
        predicted = flops_ratio(name)
        if predicted:
            known = _positive(results, name, "ratio")
            yield Check(name=name, source="FLOPs of both", predicted=predicted, known=known, unit="x")


def flops_ratio(name: str) -> float | None:
    """The ratio that the benchmark of this name would have at equal MFU on both sides: FLOPs of a pair there
    over those here.

    None for a benchmark of something else, or of a model whose FLOPs are not counted.
    """
    entry = MEASURED.fullmatch(name)
    if entry is None:
        return _bench_ratios().get(name)
    if entry["family"] not in FACTS:
        return None
    ratios = {checkpointing: public / ours for checkpointing, ours, public in ceilings(entry["family"])}
    return ratios[entry["checkpointing"] == "with"]


def _bench_ratios() -> dict[str, float]:
    ratios = {}
    for title, model in BENCHED.items():
        ledger = model.text_flops + 6 * model.forward_flops
        online = ledger + 2 * model.forward_flops
        public = online + 2 * model.vae_flops
        ratios[f"ledger_vs_online{title}"] = online / ledger
        ratios[f"train_vs_public_recipe{title}"] = public / ledger
    return ratios


def _positive(results: Mapping[str, Any], name: str, field: str) -> float:
    """A number of an entry. Raises ConfigError for anything but a finite number greater than 0."""
    entry = results[name]
    number = entry.get(field) if isinstance(entry, Mapping) else None
    if not isinstance(number, int | float) or not 0 < number < math.inf:
        raise ConfigError(f"calibration[{name!r}].{field}", number, "must be a number greater than 0")
    return float(number)
