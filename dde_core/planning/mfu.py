"""How fast a GPU computes, as a share of its peak, and what that number says of runs that it was not taken from.

A share comes from the hours of a published run, or from a measured step of `tests/bench/gpu_step.py`. One number that is fitted
to one run proves nothing by giving that run back, so `checks` predicts others: Diffusion-DPO's runs from each other's share (or
both from a measured one), and MosaicML's precompute, which is the VAE alone. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.planning.estimate import pair_flops, public_recipe_flops, published_share
from dde_core.planning.facts import BENCHED, FACTS, GPUS, PRECOMPUTES

A100 = GPUS["a100"]
MEASURED = re.compile(
    r"(\w+) at \d+ px, bf16, micro (\d+), (with|without) gradient checkpointing(, compiled)?, train_vs_public_recipe"
)
"""Entries of `python -m tests.bench.gpu_step --out FILE`: ``value`` is our pairs/s on a ledger, ``ratio`` how many times the
public recipe's on the same GPU."""

UNIFORM = ObjectiveConfig(method="uniform")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """``share`` of a GPU's dense bf16 peak; ``source`` says in words where it is from; ``family`` whose published hours it
    gives back (None: measured)."""

    share: float
    source: str
    family: str | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is predicted of a run by a number taken from elsewhere, and what is known of it."""

    name: str
    source: str
    predicted: float
    known: float
    unit: str

    @property
    def ratio(self) -> float:
        return self.predicted / self.known


def published(family: str) -> Speed:
    """The share that Diffusion-DPO's published hours of this family come to. Raises ConfigError for an unknown family."""
    if family not in FACTS:
        raise ConfigError("family", family, f"must be one of {', '.join(FACTS)}")
    run = FACTS[family].published
    source = f"Diffusion-DPO's {run.gpu_hours:,.0f} A100-hours, {family}"
    return Speed(share=published_share(FACTS[family]), source=source, family=family)


def measured(results: Mapping[str, Any], family: str, gpu: str, training: TrainConfig) -> Speed | None:
    """The share of the fastest measured steps of this family, where there are such of those on this GPU, with this gradient
    checkpointing and compilation; None without a step of this family on a known GPU. Raises ConfigError for a value that is no
    speed."""
    found = []
    for name, entry in _measured(results):
        if entry[1] != family:
            continue
        pairs_per_s, checkpointed = _positive(results, name, "value"), entry[3] == "with"
        if (on := gpu_of(str(results[name].get("machine")))) is None:
            continue
        share = pairs_per_s * ours_flops(family, checkpointed) / GPUS[on].peak
        how = f"micro {entry[2]}, {entry[3]} checkpointing{entry[4] or ''}"
        source = f"measured: {pairs_per_s:.4g} pairs/s of {family} on an {GPUS[on].title}, {how}"
        alike = (
            on == gpu,
            checkpointed == training.gradient_checkpointing,
            bool(entry[4]) == training.compile,
        )
        found.append((*alike, share, source))
    if not found:
        return None
    *_, share, source = max(found)
    return Speed(share=share, source=source)


def _measured(results: Mapping[str, Any]) -> Iterator[tuple[str, re.Match[str]]]:
    return ((name, entry) for name in results if (entry := MEASURED.fullmatch(name)))


def gpu_of(machine: str) -> str | None:
    """Which known GPU a name such as "NVIDIA H100 80GB HBM3" is of."""
    return next((name for name in GPUS if name in machine.lower()), None)


def ours_flops(family: str, checkpointing: bool) -> float:
    """Of a pair in a step of ours on a ledger."""
    return pair_flops(
        FACTS[family], UNIFORM, TrainConfig(reference="ledger", gradient_checkpointing=checkpointing)
    )


def checks(speed: Speed) -> Iterator[Check]:
    """A100-hours of published runs as a share predicts them that was not taken from them."""
    yield from training_checks(speed)
    yield from encoding_checks(speed)


def training_checks(speed: Speed) -> Iterator[Check]:
    """Diffusion-DPO's runs."""
    for family, facts in FACTS.items():
        for other in (
            [speed] if speed.family is None else [published(name) for name in FACTS if name != family]
        ):
            hours = facts.published.gpu_hours * published_share(facts) / other.share
            yield Check(
                name=f"Diffusion-DPO, {facts.title}",
                source=other.source,
                predicted=hours,
                known=facts.published.gpu_hours,
                unit="A100-hours",
            )


def encoding_checks(speed: Speed) -> Iterator[Check]:
    """MosaicML's precompute, under both readings."""
    for run in PRECOMPUTES:
        hours = run.gpu_hours * run.pictures_per_s * run.vae_flops / (speed.share * A100.peak)
        yield Check(
            name=run.title, source=speed.source, predicted=hours, known=run.gpu_hours, unit="A100-hours"
        )


def ceilings(family: str) -> Iterator[tuple[bool, float, float]]:
    """(with gradient checkpointing, FLOPs of a pair here on a ledger, FLOPs of a pair in the public recipe): their quotient is
    how much faster training can be at equal speed of the arithmetic."""
    for checkpointing in (True, False):
        yield (
            checkpointing,
            ours_flops(family, checkpointing),
            public_recipe_flops(FACTS[family], 5 if checkpointing else 4),
        )


def benchmarks(results: Mapping[str, Any]) -> Iterator[Check]:
    """Measured ratios, wherever they were measured, as arithmetic alone predicts them: a ledger's run against one with the
    reference in every step, and against the public recipe, in `make bench` and on a GPU."""
    for name in sorted(results):
        if predicted := by_arithmetic(name):
            known = _positive(results, name, "ratio")
            yield Check(name=name, source="FLOPs of both", predicted=predicted, known=known, unit="x")


def by_arithmetic(name: str) -> float | None:
    """The ratio that a benchmark of this name would have if both sides computed at one speed, and did nothing else: FLOPs of a
    pair there over those here. None where it measures something else, or a model that is not counted."""
    if entry := MEASURED.fullmatch(name):
        counted = ceilings(entry[1]) if entry[1] in FACTS else ()
        return next(
            (
                public / ours
                for checkpointing, ours, public in counted
                if checkpointing == (entry[3] == "with")
            ),
            None,
        )
    quotients = {}
    for title, model in BENCHED.items():
        ours = model.text_flops + 6 * model.forward_flops
        online = ours + 2 * model.forward_flops
        quotients[f"ledger_vs_online{title}"] = online / ours
        quotients[f"train_vs_public_recipe{title}"] = (online + 2 * model.vae_flops) / ours
    return quotients.get(name)


def _positive(results: Mapping[str, Any], name: str, field: str) -> float:
    """A number of an entry. Raises ConfigError where it is none."""
    number = results[name].get(field) if isinstance(results[name], Mapping) else None
    if not isinstance(number, int | float) or not 0 < number < math.inf:
        raise ConfigError(f"calibration[{name!r}].{field}", number, "must be a number greater than 0")
    return float(number)
