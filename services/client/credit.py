"""`dde credit`: where each method puts its credit, as a picture, a table or JSON. Imports torch; the picture, matplotlib."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dde_core.calibration import Calibration
from dde_core.config import Method, ObjectiveConfig
from dde_core.credit import STABLE_DIFFUSION, Curves, curves
from dde_core.errors import ConfigError
from dde_core.objectives import OBJECTIVES
from dde_core.schedule import Schedule
from services.api.records import CreditBucket, CreditRecord

BATCH_SIZE = 2048
"""What DDE trains with, where no job says otherwise."""

METHODS = get_args(Method)
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Credit:
    """All that is drawn and printed. ``objective`` is what the methods share; ``job_correction`` is C(1..T) of the job."""

    objective: ObjectiveConfig
    schedule: Schedule
    margin: float
    batch_size: int
    methods: Mapping[str, Curves]
    job: CreditRecord | None = None
    job_correction: Tensor | None = None

    @property
    def t(self) -> range:
        return range(1, self.schedule.T + 1)


def compute(
    job: CreditRecord | None,
    methods: Sequence[str],
    margin: float,
    batch_size: int | None,
    options: Mapping[str, Any],
    scheduler: Mapping[str, Any] = STABLE_DIFFUSION,
) -> Credit:
    """Curves of these methods (none: all) with the job's objective and schedule, or the defaults on a scheduler's config.

    ``options`` are fields of the objective; those that are not None go before the job's. Raises ConfigError, naming field
    and value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    objective = dataclasses.replace(job.objective if job else ObjectiveConfig(), **given)
    batch_size = (job.batch_size if job else BATCH_SIZE) if batch_size is None else batch_size
    if batch_size < 1:
        raise ConfigError("batch_size", batch_size, "must be at least 1")
    schedule = Schedule.from_config(job.scheduler if job else scheduler)
    configs = [dataclasses.replace(objective, method=method) for method in methods or METHODS]  # type: ignore[arg-type]
    return Credit(
        objective=objective,
        schedule=schedule,
        margin=margin,
        batch_size=batch_size,
        methods={config.method: curves(config, schedule, margin) for config in configs},
        job=job,
        job_correction=_job_correction(job, schedule) if job else None,
    )


def _job_correction(job: CreditRecord, schedule: Schedule) -> Tensor:
    """C(1..T) from the job's coefficients as they were after its last step; 0 for a method without a correction."""
    t = torch.arange(1, schedule.T + 1)
    calibration = Calibration(schedule, job.objective)
    if OBJECTIVES[job.objective.method].corrected:
        arrays = {name: torch.tensor(values, dtype=torch.float64) for name, values in job.calibration.items()}
        calibration.load_state_dict(arrays)
    return calibration.correction(t)


def as_json(credit: Credit) -> str:
    """The curves as strict JSON, one number for each t."""
    said: dict[str, Any] = {"t": list(credit.t)}
    for method, curve in credit.methods.items():
        said[method] = {
            name: getattr(curve, name).tolist() for name in ("gradient_weight", "correction", "density")
        }
    if credit.job is not None and credit.job_correction is not None:
        buckets = [bucket.model_dump() for bucket in credit.job.buckets]
        said["job"] = {"buckets": buckets, "correction": credit.job_correction.tolist()}
    return json.dumps(said, allow_nan=False)


def show(credit: Credit, console: Console, out: Path) -> None:
    """Write the picture and print the table that belongs to it."""
    from services.client.credit_picture import draw

    draw(credit, out)
    console.print(job_table(credit.job) if credit.job else methods_table(credit))
    console.print(f"picture {out}", soft_wrap=True, highlight=False)


def methods_table(credit: Credit) -> Table:
    """For each method the t at which its credit peaks, and those below which 10%, half and 90% of it lie."""
    title = f"beta {credit.objective.beta:g}, margin {credit.margin:g} at every t of 1..{credit.schedule.T}"
    table = _table("method", "peak at t", *(f"{share:.0%} below t" for share in QUANTILES), title=title)
    for method, curve in credit.methods.items():
        table.add_row(method, _peak(curve.credit), *(_quantile(curve.credit, share) for share in QUANTILES))
    return table


def job_table(job: CreditRecord) -> Table:
    """Tenths of the timesteps: the gradient weight as it was logged beside what the margins say it must have been."""
    title = f"{job.objective.method}, {job.steps} steps of {job.batch_size} pairs"
    table = _table("t", "pairs", "margin", "logged g", "predicted g", "ratio", title=title)
    for bucket in job.buckets:
        margin = "" if bucket.margin is None else f"{bucket.margin:+.3e}"
        span = f"{bucket.t_first}..{bucket.t_last}"
        table.add_row(
            span, str(bucket.pairs), margin, f"{bucket.logged:.4g}", f"{bucket.predicted:.4g}", _ratio(bucket)
        )
    return table


def _table(*columns: str, title: str) -> Table:
    table = Table(columns[0], box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title=title)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _ratio(bucket: CreditBucket) -> str:
    """Logged by predicted; 0 by 0 is no ratio."""
    return f"{bucket.logged / bucket.predicted:.4f}" if bucket.predicted > 0 else ""


def _peak(credit: Tensor) -> str:
    """The t of the most credit, where there is one."""
    drawn = credit[credit > 0]
    if len(drawn) == 0:
        return "none"
    return "flat" if drawn.max() - drawn.min() <= 1e-9 * drawn.max() else str(int(credit.argmax()) + 1)


def _quantile(credit: Tensor, share: float) -> str:
    """The first t up to which at least this share of the credit lies."""
    cumulative = credit.cumsum(0)
    return str(int(torch.searchsorted(cumulative, share * cumulative[-1])) + 1) if cumulative[-1] > 0 else ""
