"""`dde plan`: print a run's estimate, its check against known runs, and the effect of other settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dde_core.planning import mfu
from dde_core.planning.cluster import Cluster
from dde_core.planning.estimate import Term, fit_in_memory
from dde_core.planning.mfu import Check, Mfu
from dde_core.planning.plan import PICK_A_PIC_PAIRS, Plan, Run, alternatives, plan, value
from dde_core.planning.rounds import Rounds
from services.api.requests import AlignmentJobCreate
from services.client.tables import label, new_table, number

MODES = {
    "none": "one GPU",
    "ddp": "DDP, the whole model on each GPU",
    "fsdp": "FSDP2, a shard of the model on each GPU",
}


def show(
    console: Console,
    body: AlignmentJobCreate,
    family: str,
    cluster: Cluster,
    results: Mapping[str, Any] | None = None,
    num_pairs: int = PICK_A_PIC_PAIRS,
) -> None:
    """Plan a job's training on the cluster and print it. ``results`` is the ``results.json`` of a benchmark.

    Raises ConfigError, naming field and value, before it prints anything.
    """
    run_mfu, source = mfu_of(family, cluster, body, results)
    run = Run(
        family=family,
        objective=body.objective,
        training=body.training,
        cluster=cluster,
        mfu=run_mfu,
        num_pairs=num_pairs,
        rounds=rounds_of(body),
    )
    planned = plan(run)
    console.print(headline(planned), source, "", sep="\n", soft_wrap=True, highlight=False, markup=False)
    for table in tables(planned, results or {}):
        console.print(table, "")


def rounds_of(body: AlignmentJobCreate) -> Rounds | None:
    """How the job draws its pairs, if it does."""
    if body.rollouts is None:
        return None
    return Rounds(**{each.name: getattr(body.rollouts, each.name) for each in fields(Rounds)})


def mfu_of(
    family: str, cluster: Cluster, body: AlignmentJobCreate, results: Mapping[str, Any] | None
) -> tuple[Mfu, str]:
    """The measured MFU if the results have one, else the published one; and a line naming its source."""
    why = ""
    if results is not None:
        measured = mfu.measured(results, family, cluster.gpu, body.training)
        if measured:
            return measured, f"calibrated: {measured.source}"
        why = f"the results have no measured step of {family} in bf16 on a known GPU; "
    published = mfu.published(family)
    measure = f"python -m tests.bench.gpu_step --model {family} --out FILE"
    return published, f"{why}calibrated by {published.source}; better: {measure}"


def headline(planned: Plan) -> str:
    """The run in one line, with the known error of such estimates."""
    run = planned.run
    job = f"{run.facts.title}, {run.objective.method}"
    where = f"{run.cluster.gpus} x {run.cluster.kind.title} in {run.cluster.nodes} nodes"
    if run.rounds:
        where += f" and {run.rounds.gpus} for {run.rounds.gpus_text}"
    step_s = value(planned.step, "step")
    hours = value(planned.hours, "total")
    usd = value(planned.hours, "price")
    training = spread(mfu.training_checks(run.mfu))
    encoding = spread(mfu.encoding_checks(run.mfu))
    checked = f"(checks: {training} of published hours of training, {encoding} of encoding)"
    return f"{job}, on {where}: {step_s:.3g} s a step, {hours:,.1f} h, {usd:,.0f} USD {checked}"


def spread(checks: Iterable[Check]) -> str:
    """The least and the largest ratio of prediction to known value."""
    ratios = [check.ratio for check in checks]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def tables(planned: Plan, results: Mapping[str, Any]) -> Iterable[Table]:
    """The tables below the headline, in order."""
    if planned.run.rounds:
        yield terms("a trajectory and the training of its pairs, in U-Net forwards", planned.prompt)
        yield terms("a round", planned.round)
        yield from actors(planned)
    yield terms("a step", planned.step)
    yield memory(planned)
    yield terms("round store" if planned.run.rounds else "data", planned.data)
    yield terms("checkpoints", planned.checkpoint)
    yield terms("hours and price", planned.hours)
    if not planned.run.rounds:
        yield ceilings(planned.run.family)
    yield checks(planned.run.mfu, results)
    yield changes(planned)


def terms(title: str, shown: Iterable[Term]) -> Table:
    """Terms with their formulas; each term follows those that it is derived from."""
    table = new_table(title, label("term"), number(""), "formula")
    for term in shown:
        table.add_row(term.name, f"{rounded(term.value)} {term.unit}", escape(term.formula))
    return table


def memory(planned: Plan) -> Table:
    """Memory of one GPU, one column for each parallelism; a star marks the run's own."""
    modes = list(planned.memory)
    gpu = planned.run.cluster.kind
    columns = [number(f"{mode} GB *" if mode == planned.parallelism else f"{mode} GB") for mode in modes]
    table = new_table(f"memory of one {gpu.title}", label("term"), *columns, "formula")
    terms = {mode: {term.name: term for term in planned.memory[mode]} for mode in modes}
    for name in dict.fromkeys(name for mode in modes for name in terms[mode]):
        values = [f"{terms[mode][name].value:,.2f}" if name in terms[mode] else "-" for mode in modes]
        formula = next(terms[mode][name].formula for mode in reversed(modes) if name in terms[mode])
        table.add_row(name, *values, escape(formula))
    totals = [f"{planned.memory_gb(mode):,.2f}" for mode in modes]
    fits = "; ".join(f"{mode} {planned.fit(mode)}" for mode in modes)
    table.add_row("total", *totals, f"of {gpu.memory_gb:g} GB: {fits}", style="bold")
    requested = f'training.parallelism "{planned.run.training.parallelism}"'
    this_run = f"* this run: {MODES[planned.parallelism]} ({requested})."
    table.caption = f"{this_run} Formulas: the last column's."
    table.caption_justify = "left"
    return table


def actors(planned: Plan) -> Iterable[Table]:
    """Memory of each kind of actor."""
    gpu = planned.run.cluster.kind
    for kind, held in planned.actors.items():
        table = terms(f"memory of one {kind}", held)
        total = sum(term.value for term in held)
        table.add_row("total", f"{total:,.2f} GB", f"of {gpu.memory_gb:g} GB: {fit_in_memory(total, gpu)}")
        yield table


def ceilings(family: str) -> Table:
    """How much faster than the public recipe training can be, by arithmetic alone."""
    columns = (number("here, ledger"), number("public recipe"), number("ceiling"))
    table = new_table("arithmetic of a pair, TFLOP", label("gradient checkpointing"), *columns)
    for checkpointing, ours, public in mfu.ceilings(family):
        row = (f"{ours / 1e12:.2f}", f"{public / 1e12:.2f}", f"{public / ours:.2f}x")
        table.add_row("on" if checkpointing else "off", *row)
    public_recipe = "Public recipe: VAE, text, policy and reference in every step."
    table.caption = f"{public_recipe} Here: text and policy. All at the same MFU."
    table.caption_justify = "left"
    return table


def checks(run_mfu: Mfu, results: Mapping[str, Any]) -> Table:
    """Predictions beside known values, made from numbers that do not come from those values."""
    columns = ("run", number("predicted"), number("known"), number("ratio"), "predicted from")
    table = new_table("estimates against known runs", *columns)
    for check in (*mfu.checks(run_mfu), *mfu.benchmarks(results)):
        numbers = (rounded(check.predicted), rounded(check.known), f"{check.ratio:.2f}")
        table.add_row(f"{check.name}, {check.unit}", *numbers, escape(check.source))
    return table


def changes(planned: Plan) -> Table:
    """The plan, and the plan with one setting changed."""
    columns = (number("s a step"), "mode", number("GB"), "fit", number("h"), number("USD"))
    table = new_table("what changes the numbers", label("setting"), *columns)
    for name, other in (("as planned", planned), *alternatives(planned)):
        mode = other.parallelism
        table.add_row(
            name,
            f"{value(other.step, 'step'):.3g}",
            mode,
            f"{other.memory_gb(mode):,.1f}",
            other.fit(mode),
            f"{value(other.hours, 'total'):,.2f}",
            f"{value(other.hours, 'price'):,.0f}",
        )
    return table


def rounded(quantity: float) -> str:
    """Four significant digits, or all before the point: ``1,033``, ``0.08968``."""
    return f"{quantity:,.0f}" if abs(quantity) >= 1000 else f"{quantity:.4g}"
