"""What the commands print: lists, the comparison of two models, what a run is estimated to need."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dde_core.planning.estimate import Estimate
from services.api.records import DatasetCounts, DatasetReport, EvaluateResult, Interval
from services.api.requests import ALL_SCORERS
from services.client.types import Checkpoint


def print_list(console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table in a terminal, tab-separated values anywhere else."""
    if not console.is_terminal:
        for row in [columns, *rows]:
            console.file.write("\t".join(map(str, row)) + "\n")  # console.print turns tabs into spaces
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table, markup=False)


def counted(counts: DatasetCounts) -> str:
    """A dataset's counts in one line."""
    bad = ", ".join(f"{cause} {number}" for cause, number in counts.bad.items())
    line = f"{counts.rows} rows: {counts.pairs} pairs, {counts.ties} ties, {counts.missing} without a label"
    return f"{line}, {sum(counts.bad.values())} bad ({bad})" if bad else line


def print_report(console: Console, report: DatasetReport) -> None:
    """What a sample of a dataset shows: what is read, how many rows of each kind, what is bad and why."""
    rows = "not counted" if report.rows is None else f"{report.rows:,}"
    columns = ", ".join(name if name == own else f"{name} = {own}" for name, own in report.columns.items())
    pictures = report.pictures
    sizes = f"{pictures.min_px} / {pictures.median_px} / {pictures.max_px}" if pictures else "none was read"
    facts = {
        "rows": f"{rows}; {report.format}, one {report.shape} a row",
        "columns": columns,
        "not read": ", ".join(report.columns_not_read) or "-",
        "sample": ", ".join(f"{count} {kind}" for kind, count in report.sampled.items()),
        "shorter sides, px": f"{sizes} (smallest / median / largest)",
    }
    print_list(console, ("fact", report.uri), facts.items())
    if report.bad:
        found = [
            (cause, bad.count, one.row, one.detail)
            for cause, bad in report.bad.items()
            for one in bad.examples
        ]
        print_list(console, ("bad", "rows", "for example", "detail"), found)


def comparison(result: EvaluateResult, base: str, candidate: str) -> Table:
    """Every scorer: the mean of both models, the paired difference and the beat ratio with their 95% intervals.

    Narrow enough for 80 columns with names of up to 14 letters.
    """
    table = Table(
        "scorer",
        base,
        candidate,
        "difference [95%]",
        "beat ratio [95%]",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title=f"{candidate} against {base}, {result.num_prompts} held-out prompts, the same seed for both",
    )
    for name in [name for name in ALL_SCORERS if name in result.scores]:
        scores = result.scores[name]
        ratio, difference = interval(scores.beat_ratio), interval(scores.difference, signed=True)
        table.add_row(name, f"{scores.base:.3f}", f"{scores.candidate:.3f}", difference, ratio)
    return table


def durations(seconds: Mapping[str, float]) -> Table:
    """Seconds of each stage, one column each."""
    table = Table(*seconds, title="seconds", box=SIMPLE_HEAD, show_edge=False)
    table.add_row(*(f"{value:.1f}" for value in seconds.values()))
    return table


def memory(estimate: Estimate) -> Table:
    """What lies on one GPU: every term in GB of 10^9 bytes with its formula, and their sum."""
    table = _terms(f"memory of one {estimate.gpu.title}: {estimate.model}", "GB")
    for term in estimate.memory:
        table.add_row(term.name, f"{term.value:,.2f}", escape(term.formula))
    table.add_row(
        "together",
        f"{estimate.memory_gb:,.2f}",
        f"of {estimate.gpu.memory_gb:g} GB: {estimate.room}",
        style="bold",
    )
    table.caption = "Training alone."
    table.caption_justify = "left"
    return table


def gpu_time(estimate: Estimate) -> Table:
    """From a sample's arithmetic to the hours of a run, each with its formula."""
    table = _terms(f"time on such GPUs: {estimate.model}", "")
    for term in estimate.time:
        table.add_row(term.name, f"{term.value:,.4g} {term.unit}", escape(term.formula))
    return table


def _terms(title: str, unit: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("term", no_wrap=True)
    table.add_column(unit, justify="right", no_wrap=True)
    table.add_column("formula")
    return table


def interval(interval: Interval, *, signed: bool = False) -> str:
    """``0.640 [0.571, 0.703]``."""
    form = "+.3f" if signed else ".3f"
    return f"{interval.value:{form}} \\[{interval.low:{form}}, {interval.high:{form}}]"


def checkpoint(found: Checkpoint) -> tuple[object, ...]:
    """One row under ``CHECKPOINT``."""
    validated = found.validation
    numbers = (
        " ".join(f"{name}={value:.4f}" for name, value in validated.metrics.items()) if validated else ""
    )
    measured = (validated and validated.error) or numbers
    return (
        found.step,
        found.images_seen,
        f"{found.bytes / 1e6:,.1f}",
        found.workers,
        measured,
        found.uri,
        moment(found.created_at),
    )


CHECKPOINT = ("step", "images", "MB", "workers", "validation", "uri", "created")


def moment(created_at: float) -> str:
    """A time of creation for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created_at))
