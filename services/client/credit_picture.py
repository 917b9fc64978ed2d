"""The picture of `dde credit`. Imports matplotlib, without its global state and without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dde_core.credit import start_left
from dde_core.objectives import OBJECTIVES, single_shot
from services.api.records import CreditRecord
from services.client.credit import Credit

METHODS = [["credit", "terms", "convergence"]]
WITH_JOB = [*METHODS, ["job_correction", "job", "job"]]
BATCH_SIZES = (64, 256)
"""Drawn for comparison beside the batch size that was asked for."""
CONVERGENCE_STEPS = 500
LOOKS = {"dde": ("C0", "-"), "dde_single": ("C1", "-"), "dde_step": ("C2", "-"), "uniform": ("C3", "-"),
         "discounted": ("C4", "-"), "sft": ("C7", "--")}  # fmt: skip
"""A method has the same colour in every picture; `sft` and `uniform` are both flat, so one is dashed."""


def draw(credit: Credit, path: Path) -> None:
    """Write a PNG of three panels, of five where there is a job."""
    rows: Any = WITH_JOB if credit.job else METHODS
    figure = Figure(figsize=(15, 4.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic(rows)
    _credit(panels["credit"], credit)
    _terms(panels["terms"], credit)
    _convergence(panels["convergence"], credit)
    if credit.job and credit.job_correction is not None:
        _correction(panels["job_correction"], credit.job, credit.job_correction)
        _buckets(panels["job"], credit.job)
    figure.savefig(path, format="png", dpi=100)


def _credit(axes: Axes, credit: Credit) -> None:
    """g(t) times the density of t, on one scale: where `dde` lies below `dde_single`, C(t) has taken credit."""
    most = max((curve.credit.max().item() for curve in credit.methods.values()), default=0.0)
    for method, curve in credit.methods.items():
        colour, line = LOOKS[method]
        axes.plot(credit.t, curve.credit, line, color=colour, label=method)
    axes.set(title=f"Credit at margin {credit.margin:g}, beta {credit.objective.beta:g}", xlabel="t")
    axes.set_ylabel("g(t) x density of t")
    if most > 0:  # a huge margin leaves no credit at all
        axes.set(yscale="log", ylim=(1e-4 * most, 10 * most))
    axes.legend(loc="upper center", ncols=3, fontsize="small")


def _terms(axes: Axes, credit: Credit) -> None:
    """DDE's Fig. 5(a): what saturates the loss near 0 is C(t), what does it near T is 1/SNR(t)."""
    corrected = [curve for method, curve in credit.methods.items() if OBJECTIVES[method].corrected]
    weight = axes.twinx()
    lines = weight.plot(credit.t, single_shot(credit.schedule)[1:], color="C1", label="1/SNR(t)")
    weight.set(yscale="log", ylabel="1/SNR(t)")
    if corrected:
        lines += axes.plot(credit.t, corrected[0].correction, color="C0", label="C(t)")
    axes.set(title="Correction and DDIM weight", xlabel="t", ylabel="C(t)")
    axes.legend(handles=lines, loc="upper center")


def _convergence(axes: Axes, credit: Credit) -> None:
    """DDE's Fig. 5(b), as a law: how much of their start the coefficients still hold."""
    steps = torch.arange(CONVERGENCE_STEPS + 1)
    for batch_size in sorted({*BATCH_SIZES, credit.batch_size}):
        axes.plot(
            steps,
            start_left(credit.objective, credit.schedule, batch_size, steps),
            label=f"{batch_size} pairs",
        )
    axes.axhline(0.05, color="0.7", linewidth=0.8)
    axes.set(title="Convergence of the coefficients", xlabel="step", ylabel="share of the start that is left")
    axes.set(yscale="log", ylim=(1e-4, 1.2))
    axes.legend(title="global batch")


def _correction(axes: Axes, job: CreditRecord, correction: torch.Tensor) -> None:
    """C(t) of the job after its last step."""
    axes.plot(range(1, len(correction) + 1), correction, color="C0")
    axes.set(title=f"C(t) of the job after {job.steps} steps", xlabel="t", ylabel="C(t)")


def _buckets(axes: Axes, job: CreditRecord) -> None:
    """Logged against predicted gradient weights, means over tenths of the timesteps: often orders of magnitude apart."""
    places, most = np.arange(len(job.buckets)), max((bucket.logged for bucket in job.buckets), default=0)
    for shift, name in ((-0.2, "logged"), (0.2, "predicted")):
        axes.bar(places + shift, [getattr(bucket, name) for bucket in job.buckets], 0.4, label=name)
    axes.set_xticks(places, [f"{bucket.t_first}..{bucket.t_last}" for bucket in job.buckets])
    axes.set(title=f"Gradient weight of the job ({job.objective.method})", xlabel="t", ylabel="mean g")
    if most > 0:
        axes.set(yscale="log", ylim=(1e-6 * most, 3 * most))
    axes.legend(loc="upper left")
