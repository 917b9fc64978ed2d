"""`dde plan`: what a run on a cluster takes, printed term by term, how the model behind it fares where more is known, and what
would change the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dde_core.planning import mfu
from dde_core.planning.cluster import Cluster
from dde_core.planning.estimate import Term
from dde_core.planning.mfu import Check, Speed
from dde_core.planning.plan import PICK_A_PIC_PAIRS, Plan, Run, changed, plan, value
from services.api.requests import AlignmentJobCreate

HELD = {"none": "on one GPU", "ddp": "DDP, a whole model each", "fsdp": "FSDP2, a part of the model each"}


def show(
    console: Console,
    body: AlignmentJobCreate,
    family: str,
    cluster: Cluster,
    results: Mapping[str, Any] | None = None,
    num_pairs: int = PICK_A_PIC_PAIRS,
) -> None:
    """Plan the job's training on the cluster and print everything. ``results`` are benchmarks' (``results.json``).

    Raises ConfigError with field and value, before anything is printed.
    """
    at, told = speed_of(family, cluster, body, results)
    run = Run(
        family=family,
        objective=body.objective,
        training=body.training,
        cluster=cluster,
        speed=at,
        num_pairs=num_pairs,
    )
    planned = plan(run)
    console.print(headline(planned), told, "", sep="\n", soft_wrap=True, highlight=False, markup=False)
    for table in tables(planned, results or {}):
        console.print(table, "")


def speed_of(
    family: str, cluster: Cluster, body: AlignmentJobCreate, results: Mapping[str, Any] | None
) -> tuple[Speed, str]:
    """Measured where the results have it, else published; and which of the two, in words."""
    found = mfu.measured(results, family, cluster.gpu, body.training) if results is not None else None
    if found:
        return found, f"calibrated: {found.source}"
    at = mfu.published(family)
    why = "" if results is None else f"the results have no measured step of {family} in bf16 on a known GPU; "
    return (
        at,
        f"{why}calibrated by {at.source}; better: python -m tests.bench.gpu_step --model {family} --out FILE",
    )


def headline(planned: Plan) -> str:
    """The run in one line, with the error that is known of such numbers."""
    cluster, step = planned.run.cluster, value(planned.step, "step")
    where = f"{cluster.gpus} x {cluster.kind.title} in {cluster.nodes} nodes"
    price = f"{value(planned.hours, 'together'):,.1f} h, {value(planned.hours, 'price'):,.0f} USD"
    run = (
        f"{planned.run.facts.title}, {planned.run.objective.method}, on {where}: {step:.3g} s a step, {price}"
    )
    training, encoding = mfu.training_checks(planned.run.speed), mfu.encoding_checks(planned.run.speed)
    return (
        f"{run} (checks: {spread(training)} of published hours of training, {spread(encoding)} of encoding)"
    )


def spread(found: Iterable[Check]) -> str:
    """Least and largest of what predictions are of what is known."""
    ratios = [check.ratio for check in found]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def tables(planned: Plan, results: Mapping[str, Any]) -> Iterable[Table]:
    """All that is printed below the headline."""
    yield terms("a step", planned.step)
    yield memory(planned)
    yield terms("data", planned.data)
    yield terms("checkpoints", planned.checkpoint)
    yield terms("hours and price", planned.hours)
    yield ceilings(planned.run.family)
    yield checks(planned.run.speed, results)
    yield changes(planned)


def terms(title: str, shown: Iterable[Term]) -> Table:
    """Terms with their formulas; what is derived follows what it is derived from."""
    table = _table(title, "term", ">", "formula")
    for term in shown:
        table.add_row(term.name, f"{rounded(term.value)} {term.unit}", escape(term.formula))
    return table


def memory(planned: Plan) -> Table:
    """Of one GPU, for every way to hold the model; the run's own is marked."""
    kinds, gpu = list(planned.memory), planned.run.cluster.kind
    names = [f"{kind} GB{' *' if kind == planned.parallelism else ''}" for kind in kinds]
    table = _table(f"memory of one {gpu.title}", "term", *[f">{name}" for name in names], "formula")
    held = {kind: {term.name: term for term in planned.memory[kind]} for kind in kinds}
    for name in dict.fromkeys(name for kind in kinds for name in held[kind]):
        cells = [f"{held[kind][name].value:,.2f}" if name in held[kind] else "-" for kind in kinds]
        formula = next(held[kind][name].formula for kind in reversed(kinds) if name in held[kind])
        table.add_row(name, *cells, escape(formula))
    rooms = "; ".join(f"{kind} {planned.room(kind)}" for kind in kinds)
    totals = [f"{planned.memory_gb(kind):,.2f}" for kind in kinds]
    table.add_row("together", *totals, f"of {gpu.memory_gb:g} GB: {rooms}", style="bold")
    asked = planned.run.training.parallelism
    table.caption = f'* this run: {HELD[planned.parallelism]} (training.parallelism "{asked}"). Formulas: the last column\'s.'
    table.caption_justify = "left"
    return table


def ceilings(family: str) -> Table:
    """How much faster than the public recipe training can be by arithmetic."""
    table = _table(
        "arithmetic of a pair, TFLOP", "gradient checkpointing", ">here, ledger", ">public recipe", ">ceiling"
    )
    for checkpointing, ours, public in mfu.ceilings(family):
        row = (f"{ours / 1e12:.2f}", f"{public / 1e12:.2f}", f"{public / ours:.2f}x")
        table.add_row("on" if checkpointing else "off", *row)
    table.caption = "Public recipe: VAE, text, policy and reference in every step. Here: text and policy. At one speed of all."
    table.caption_justify = "left"
    return table


def checks(at: Speed, results: Mapping[str, Any]) -> Table:
    """Predictions of what is known, from numbers that were not taken from it."""
    table = _table("the model, checked", "run", ">predicted", ">known", ">ratio", "predicted from")
    table.columns[0].no_wrap = False  # long names give way to the numbers, on 80 columns, too
    for check in (*mfu.checks(at), *mfu.benchmarks(results)):
        numbers = (rounded(check.predicted), rounded(check.known), f"{check.ratio:.2f}")
        table.add_row(f"{check.name}, {check.unit}", *numbers, escape(check.source))
    return table


def changes(planned: Plan) -> Table:
    """The plan, and what becomes of it with one setting changed."""
    table = _table("what changes the numbers", "setting", ">s a step", "held", ">GB", "room", ">h", ">USD")
    for name, each in (("as planned", planned), *changed(planned)):
        kind = each.parallelism
        hours, usd = (value(each.hours, which) for which in ("together", "price"))
        numbers = (f"{value(each.step, 'step'):.3g}", kind, f"{each.memory_gb(kind):,.1f}", each.room(kind))
        table.add_row(name, *numbers, f"{hours:,.2f}", f"{usd:,.0f}")
    return table


def rounded(number: float) -> str:
    """Four digits, or all before the point: ``1,033``, ``0.08968``."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def _table(title: str, *columns: str) -> Table:
    """A column whose name begins with > is one of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        is_number = name.startswith(">")
        table.add_column(
            name.removeprefix(">"), justify="right" if is_number else "left", no_wrap=is_number or number == 0
        )
    return table
