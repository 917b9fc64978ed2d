"""`dde credit`: each method's credit over t as an image, a table or JSON. Only the image needs matplotlib."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dde_core.calibration import Calibration
from dde_core.config import ObjectiveConfig
from dde_core.credit import STABLE_DIFFUSION, Curves, curves, remaining_fraction
from dde_core.errors import ConfigError
from dde_core.methods import METHODS, MethodName
from dde_core.objectives import single_shot
from dde_core.schedule import Schedule
from services.api.records import CreditBucket, CreditRecord
from services.client.tables import new_table, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCH_SIZE = 2048
"""DDE's batch size in pairs, for curves without a job."""

QUANTILES = (0.1, 0.5, 0.9)
CURVE_NAMES = ("gradient_weight", "correction", "density")
"""The curves in the JSON output."""

PANELS = [["credit", "terms", "convergence"]]
PANELS_WITH_JOB = [*PANELS, ["job_correction", "job", "job"]]
COMPARED_BATCH_SIZES = (64, 256)
"""Drawn beside the requested batch size."""
CONVERGENCE_STEPS = 500
STYLES = {
    "dde": ("C0", "-"),
    "dde_single": ("C1", "-"),
    "dde_step": ("C2", "-"),
    "uniform": ("C3", "-"),
    "discounted": ("C4", "-"),
    "sft": ("C7", "--"),
}
"""Color and line of a method, the same in every image. `sft` is dashed because `uniform` is flat as well."""


@dataclass(frozen=True)
class Credit:
    """All that is drawn and printed. Methods share ``objective``; ``job_correction`` is the job's C(1..T)."""

    objective: ObjectiveConfig
    schedule: Schedule
    margin: float
    batch_size: int
    methods: Mapping[MethodName, Curves]
    job: CreditRecord | None = None
    job_correction: Tensor | None = None

    @property
    def t(self) -> range:
        return range(1, self.schedule.T + 1)


# ---- numbers


def compute(
    job: CreditRecord | None,
    methods: Sequence[str],
    margin: float,
    batch_size: int | None,
    options: Mapping[str, Any],
    scheduler: Mapping[str, Any] = STABLE_DIFFUSION,
) -> Credit:
    """The curves of these methods (none: all) with the job's objective and schedule, else with defaults and
    ``scheduler``.

    ``options`` are fields of the objective; those that are not None override the job's. Raises ConfigError,
    naming field and value.
    """
    overrides = {name: value for name, value in options.items() if value is not None}
    objective = dataclasses.replace(job.objective if job else ObjectiveConfig(), **overrides)
    if batch_size is None:
        batch_size = job.batch_size if job else BATCH_SIZE
    if batch_size < 1:
        raise ConfigError("batch_size", batch_size, "must be at least 1")
    schedule = Schedule.from_config(job.scheduler if job else scheduler)
    configs = [
        dataclasses.replace(objective, method=name)  # type: ignore[arg-type]  # refuses other names
        for name in methods or _comparable(job)
    ]
    return Credit(
        objective=objective,
        schedule=schedule,
        margin=margin,
        batch_size=batch_size,
        methods={config.method: curves(config, schedule, margin) for config in configs},
        job=job,
        job_correction=_job_correction(job, schedule) if job else None,
    )


def _comparable(job: CreditRecord | None) -> list[MethodName]:
    """All methods but on-policy ones, whose beta is another; a job's own is among them."""
    own = job.objective.method if job else None
    return [name for name, method in METHODS.items() if name == own or not method.on_policy]


def _job_correction(job: CreditRecord, schedule: Schedule) -> Tensor:
    """C(1..T) from the job's coefficients after its last step; 0 for a method without a correction."""
    t = torch.arange(1, schedule.T + 1)
    calibration = Calibration(schedule, job.objective)
    if METHODS[job.objective.method].corrected:
        arrays = {name: torch.tensor(values, dtype=torch.float64) for name, values in job.calibration.items()}
        calibration.load_state_dict(arrays)
    return calibration.correction(t)


# ---- JSON and tables


def as_json(credit: Credit) -> str:
    """The curves as strict JSON, one number for each t."""
    output: dict[str, Any] = {"t": list(credit.t)}
    for method, curve in credit.methods.items():
        output[method] = {name: getattr(curve, name).tolist() for name in CURVE_NAMES}
    if credit.job is not None and credit.job_correction is not None:
        buckets = [bucket.model_dump() for bucket in credit.job.buckets]
        output["job"] = {"buckets": buckets, "correction": credit.job_correction.tolist()}
    return json.dumps(output, allow_nan=False)


def show(credit: Credit, console: Console, out: Path) -> None:
    """Write the image and print its table."""
    draw(credit, out)
    console.print(job_table(credit.job) if credit.job else methods_table(credit))
    console.print(f"image {out}", soft_wrap=True, highlight=False)


def methods_table(credit: Credit) -> Table:
    """For each method the t of the most credit, and the t below which 10%, 50% and 90% of the credit lie."""
    title = f"beta {credit.objective.beta:g}, margin {credit.margin:g} at every t of 1..{credit.schedule.T}"
    quantile_columns = [number(f"{fraction:.0%} below t") for fraction in QUANTILES]
    table = new_table(title, "method", number("peak at t"), *quantile_columns, title_justify="center")
    for method, curve in credit.methods.items():
        quantiles = [_quantile(curve.credit, fraction) for fraction in QUANTILES]
        table.add_row(method, _peak(curve.credit), *quantiles)
    return table


def job_table(job: CreditRecord) -> Table:
    """Per tenth of the timesteps: the logged gradient weight, and the one predicted from the margins."""
    title = f"{job.objective.method}, {job.steps} steps of {job.batch_size} pairs"
    columns = [number(name) for name in ("pairs", "margin", "logged g", "predicted g", "ratio")]
    table = new_table(title, "t", *columns, title_justify="center")
    for bucket in job.buckets:
        table.add_row(
            _timesteps(bucket),
            str(bucket.pairs),
            "" if bucket.margin is None else f"{bucket.margin:+.3e}",
            f"{bucket.logged:.4g}",
            f"{bucket.predicted:.4g}",
            f"{bucket.logged / bucket.predicted:.4f}" if bucket.predicted > 0 else "",
        )
    return table


def _timesteps(bucket: CreditBucket) -> str:
    return f"{bucket.t_first}..{bucket.t_last}"


def _peak(credit: Tensor) -> str:
    """The t of the most credit; "flat" if every t with credit has the same, "none" if no t has any."""
    positive = credit[credit > 0]
    if len(positive) == 0:
        return "none"
    if positive.max() - positive.min() <= 1e-9 * positive.max():
        return "flat"
    return str(int(credit.argmax()) + 1)


def _quantile(credit: Tensor, fraction: float) -> str:
    """The first t up to which at least this fraction of the credit lies; empty if there is no credit."""
    cumulative = credit.cumsum(0)
    if cumulative[-1] <= 0:
        return ""
    return str(int(torch.searchsorted(cumulative, fraction * cumulative[-1])) + 1)


# ---- the image


def draw(credit: Credit, path: Path) -> None:
    """Write a PNG of three panels, or five with a job. Needs no display and no global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows: Any = PANELS_WITH_JOB if credit.job else PANELS  # the stubs take no list[list[str]]
    figure = Figure(figsize=(15, 4.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic(rows)
    _draw_credit(panels["credit"], credit)
    _draw_terms(panels["terms"], credit)
    _draw_convergence(panels["convergence"], credit)
    if credit.job and credit.job_correction is not None:
        _draw_correction(panels["job_correction"], credit.job, credit.job_correction)
        _draw_buckets(panels["job"], credit.job)
    figure.savefig(path, format="png", dpi=100)


def _draw_credit(axes: Axes, credit: Credit) -> None:
    """g(t) times the density of t on one scale: where `dde` is below `dde_single`, C(t) removes credit."""
    largest = max((curve.credit.max().item() for curve in credit.methods.values()), default=0.0)
    for method, curve in credit.methods.items():
        color, line = STYLES[method]
        axes.plot(credit.t, curve.credit, line, color=color, label=method)
    axes.set(title=f"Credit at margin {credit.margin:g}, beta {credit.objective.beta:g}", xlabel="t")
    axes.set_ylabel("g(t) x density of t")
    if largest > 0:  # a huge margin leaves no credit at all
        axes.set(yscale="log", ylim=(1e-4 * largest, 10 * largest))
    axes.legend(loc="upper center", ncols=3, fontsize="small")


def _draw_terms(axes: Axes, credit: Credit) -> None:
    """DDE's Fig. 5(a): C(t) saturates the loss near t = 0, 1/SNR(t) saturates it near T."""
    corrected = [curve for method, curve in credit.methods.items() if METHODS[method].corrected]
    weight_axes = axes.twinx()
    lines = weight_axes.plot(
        credit.t, single_shot(ObjectiveConfig(), credit.schedule)[1:], color="C1", label="1/SNR(t)"
    )
    weight_axes.set(yscale="log", ylabel="1/SNR(t)")
    if corrected:
        lines += axes.plot(credit.t, corrected[0].correction, color="C0", label="C(t)")
    axes.set(title="Correction and DDIM weight", xlabel="t", ylabel="C(t)")
    axes.legend(handles=lines, loc="upper center")


def _draw_convergence(axes: Axes, credit: Credit) -> None:
    """DDE's Fig. 5(b), in closed form: the fraction of the initial coefficients that remains."""
    steps = torch.arange(CONVERGENCE_STEPS + 1)
    for batch_size in sorted({*COMPARED_BATCH_SIZES, credit.batch_size}):
        remaining = remaining_fraction(credit.objective, credit.schedule, batch_size, steps)
        axes.plot(steps, remaining, label=f"{batch_size} pairs")
    axes.axhline(0.05, color="0.7", linewidth=0.8)
    axes.set(title="Convergence of the coefficients", xlabel="step", ylabel="fraction of the start remaining")
    axes.set(yscale="log", ylim=(1e-4, 1.2))
    axes.legend(title="global batch")


def _draw_correction(axes: Axes, job: CreditRecord, correction: Tensor) -> None:
    """C(t) of the job after its last step."""
    axes.plot(range(1, len(correction) + 1), correction, color="C0")
    axes.set(title=f"C(t) of the job after {job.steps} steps", xlabel="t", ylabel="C(t)")


def _draw_buckets(axes: Axes, job: CreditRecord) -> None:
    """Mean logged and predicted gradient weight per tenth of t: often orders of magnitude apart."""
    positions = range(len(job.buckets))
    for shift, name in ((-0.2, "logged"), (0.2, "predicted")):
        heights = [getattr(bucket, name) for bucket in job.buckets]
        axes.bar([position + shift for position in positions], heights, 0.4, label=name)
    axes.set_xticks(positions, [_timesteps(bucket) for bucket in job.buckets])
    axes.set(title=f"Gradient weight of the job ({job.objective.method})", xlabel="t", ylabel="mean g")
    largest = max((bucket.logged for bucket in job.buckets), default=0)
    if largest > 0 and job.objective.label == "hard":  # weights of soft labels may be negative
        axes.set(yscale="log", ylim=(1e-6 * largest, 3 * largest))
    axes.legend(loc="upper left")
