"""What the commands print: lists, the comparison of two models, estimates, and the table style they share."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dde_core.planning.estimate import Estimate
from services.api.answers import CheckpointView, RunView, StudyView, WaitingView
from services.api.records import (
    DatasetCounts,
    DatasetReport,
    DecidedExample,
    EvaluateResult,
    Interval,
    PairCounts,
    PairsResult,
    StudyReport,
)
from services.api.requests import ALL_SCORERS

CHECKPOINT_COLUMNS = ("step", "images", "MB", "workers", "validation", "uri", "created")


# ---- the builder


def new_table(title: str, *columns: Column | str, title_justify: Literal["left", "center"] = "left") -> Table:
    """An empty table without outer borders; the columns of a terminal that is too narrow wrap."""
    return Table(
        *columns,
        title=title,
        title_justify=title_justify,
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )


def label(name: str) -> Column:
    """A column of names, which never wrap."""
    return Column(name, no_wrap=True)


def number(name: str) -> Column:
    """A right-aligned column of numbers, which never wrap."""
    return Column(name, justify="right", no_wrap=True)


# ---- lists and lines


def print_list(console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table in a terminal, tab-separated values anywhere else."""
    if not console.is_terminal:
        for row in [columns, *rows]:
            console.file.write("\t".join(map(str, row)) + "\n")  # console.print turns tabs into spaces
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table, markup=False)


def local_time(created_at: float) -> str:
    """A Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created_at))


def wait(waiting: WaitingView | None) -> str:
    """``12 min, place 3: 8 of 8 jobs are active``; empty where a job does not wait."""
    if waiting is None:
        return ""
    return f"{(time.time() - waiting.since) / 60:.0f} min, {waiting}"


def outcome_line(run: RunView) -> str:
    """``ajob_1 failed: training.steps: ...``: how a job or an evaluation ended."""
    reason = f": {run.reason}" if run.reason else ""
    return f"{run.id} {run.status}{reason}"


def checkpoint_row(checkpoint: CheckpointView) -> tuple[object, ...]:
    """The values of ``CHECKPOINT_COLUMNS``; a validation that failed shows its error."""
    validation = ""
    if checkpoint.validation:
        metrics = checkpoint.validation.metrics
        numbers = " ".join(f"{name}={value:.4f}" for name, value in metrics.items())
        validation = checkpoint.validation.error or numbers
    return (
        checkpoint.step,
        checkpoint.images_seen,
        f"{checkpoint.bytes / 1e6:,.1f}",
        checkpoint.workers,
        validation,
        checkpoint.uri,
        local_time(checkpoint.created_at),
    )


# ---- datasets


def counts_line(counts: DatasetCounts) -> str:
    """A dataset's counts in one line."""
    remarks = "; ".join(remark for count, remark in _remarks(counts) if count)
    pairs = f"{counts.pairs} pairs ({remarks})" if remarks else f"{counts.pairs} pairs"
    line = f"{counts.rows} rows: {pairs}, {counts.ties} ties, {counts.missing} without a label"
    if not counts.bad:
        return line
    causes = ", ".join(f"{cause} {count}" for cause, count in counts.bad.items())
    return f"{line}, {sum(counts.bad.values())} bad ({causes})"


def made_line(result: PairsResult) -> str:
    """How scorers made a dataset, in one line."""
    spreads = ", ".join(f"{name} {spread:.3g}" for name, spread in result.spreads.items())
    line = f"{result.images} images scored, {result.ties} ties dropped; spreads: {spreads}"
    if result.agreement is None:
        return f"{line}; {result.prompts_without_pair} of {result.prompts} prompts have no pair"
    bad = sum(result.bad.values())
    return f"{line}; agrees with the former labels on {result.agreement:.1%}; {bad} cannot be used"


def example_line(example: DecidedExample) -> str:
    """A decided row in words."""
    return f'{example.chosen} is preferred to {example.rejected} for "{example.caption}" ({example.row})'


def _remarks(pairs: PairCounts) -> list[tuple[int | None, str]]:
    """Counts of pairs with their meaning."""
    counts = {
        "soft, trained on as 1 and 0 unless objective.label is soft": pairs.soft,
        "duplicate": pairs.duplicates,
        "contradicted": pairs.contradicting,
        "with a caption beyond CLIP's 77 tokens": pairs.long_captions,
    }
    return [(count, f"{count} {meaning}") for meaning, count in counts.items()]


def print_report(console: Console, report: DatasetReport) -> None:
    """Print a report: format and columns, how many rows of each kind, which rows are bad and why."""
    rows = "not counted" if report.rows is None else f"{report.rows:,}"
    columns = ", ".join(name if name == own else f"{name} = {own}" for name, own in report.columns.items())
    images = report.pictures
    sizes = f"{images.min_px} / {images.median_px} / {images.max_px}" if images else "none was read"
    facts = {
        "rows": f"{rows}; {report.format}, one {report.shape} a row",
        "columns": columns,
        "columns not read": ", ".join(report.columns_not_read) or "-",
        **_about_files(report),
        "sample": ", ".join(f"{count} {kind}" for kind, count in report.sampled.items()),
        "pairs": f"{report.pairs.pairs}: " + "; ".join(remark for _, remark in _remarks(report.pairs)),
        "transparent": f"{images.transparent} of {images.count} images" if images else "none was read",
        "shorter sides, px": f"{sizes} (smallest / median / largest)",
        "for example": example_line(report.example) if report.example else "no row is decided",
    }
    print_list(console, ("fact", report.uri), facts.items())
    if report.bad:
        examples = [
            (cause, bad.count, example.row, example.detail)
            for cause, bad in report.bad.items()
            for example in bad.examples
        ]
        print_list(console, ("bad", "rows", "for example", "detail"), examples)


def _about_files(report: DatasetReport) -> dict[str, str]:
    """The split, the files that are not read and those that are missing, of a dataset that has them."""
    facts = {"split": report.split} if report.split else {}
    if report.files_not_read:
        counts = report.files_not_read.items()
        facts["files not read"] = ", ".join(f"{count:,} {suffix}" for suffix, count in counts)
    if report.parts_missing:
        facts["parts missing"] = f"{report.parts_missing:,}, by the names of the files"
    return facts


# ---- evaluations


def comparison(result: EvaluateResult, candidate: str) -> Table:
    """Each scorer's mean for a candidate and the base, the paired difference and the beat ratio with their
    95% intervals.

    The table fits 80 columns if names have at most 14 letters.
    """
    base = result.base
    images = f" x {result.images_per_prompt} images" if result.images_per_prompt > 1 else ""
    table = new_table(
        f"{candidate} against {base}, {result.num_prompts} held-out prompts{images}, the same seed for both",
        *("scorer", base, candidate, "difference [95%]", "beat ratio [95%]"),
        title_justify="center",
    )
    known = [name for name in ALL_SCORERS if name in result.scores]
    others = [name for name in result.scores if name not in known]
    for name in known + others:
        scores = result.scores[name][candidate]
        difference = with_interval(scores.difference, signed=True)
        beat_ratio = with_interval(scores.beat_ratio)
        table.add_row(name, f"{scores.base:.3f}", f"{scores.candidate:.3f}", difference, beat_ratio)
    return table


def with_interval(interval: Interval, *, signed: bool = False) -> str:
    """``0.640 [0.571, 0.703]``, with the bracket escaped for rich."""
    form = "+.3f" if signed else ".3f"
    return f"{interval.value:{form}} \\[{interval.low:{form}}, {interval.high:{form}}]"


def durations(seconds: Mapping[str, float]) -> Table:
    """Seconds of each stage, one column each."""
    table = new_table("seconds", *seconds, title_justify="center")
    table.padding = (0, 1)  # bare numbers need the wider gap
    table.add_row(*(f"{value:.1f}" for value in seconds.values()))
    return table


# ---- studies


def cells_line(study: StudyView) -> str:
    """``2 succeeded, 1 running, 3 waiting``."""
    counts = Counter(cell.status for cell in study.cells)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def study_tables(report: StudyReport) -> list[Table]:
    """Each setting's mean scores and cost, and the contrasts with their 95% intervals."""
    scorers = report.scorers()
    settings = new_table(
        "settings: models, mean scores, seconds of all stages, images drawn",
        *(label("setting"), number("models"), *map(number, scorers), number("seconds"), number("images")),
    )
    means = [f"{report.base_scores[name]:.3f}" if name in report.base_scores else "-" for name in scorers]
    settings.add_row("base", "", *means, f"{report.seconds:.0f}", str(report.images))
    for each in report.settings:
        means = [f"{each.scores[name]:.3f}" if name in each.scores else "-" for name in scorers]
        cost = (f"{sum(each.seconds.values()):.0f}", str(each.images))
        settings.add_row(escape(each.setting), f"{each.models}/{each.cells}", *means, *cost)
    settings.caption = "base: seconds and images of the study's evaluations"
    contrasts = new_table(
        "contrasts over seeds and prompts",
        *(label("contrast"), "scorer", "difference [95%]", number("seeds"), number("adjusted p")),
    )
    for contrast in report.contrasts:
        names = f"{contrast.setting} - {contrast.against or 'base'}"
        difference = with_interval(contrast.difference, signed=True)
        numbers = (str(contrast.seeds), f"{contrast.adjusted_p:.3g}")
        contrasts.add_row(escape(names), contrast.scorer, difference, *numbers)
    return [settings, contrasts]


# ---- estimates


def memory(estimate: Estimate) -> Table:
    """Memory of one GPU: every term in GB (10^9 bytes) with its formula, and their sum."""
    table = new_table(
        f"memory of one {estimate.gpu.title}: {estimate.model}", label("term"), number("GB"), "formula"
    )
    for term in estimate.memory:
        table.add_row(term.name, f"{term.value:,.2f}", escape(term.formula))
    limit = f"of {estimate.gpu.memory_gb:g} GB: {estimate.fit}"
    table.add_row("total", f"{estimate.memory_gb:,.2f}", limit, style="bold")
    table.caption = "Training alone."
    table.caption_justify = "left"
    return table


def gpu_time(estimate: Estimate) -> Table:
    """From the arithmetic of one sample to the hours of a run, each term with its formula."""
    table = new_table(f"time on such GPUs: {estimate.model}", label("term"), number(""), "formula")
    for term in estimate.time:
        table.add_row(term.name, f"{term.value:,.4g} {term.unit}", escape(term.formula))
    return table
