"""``dde jobs``: start, watch, pause, resume and cancel alignment jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dde_core.methods import METHODS
from dde_core.planning.estimate import estimate
from services.api.answers import JobView
from services.api.requests import AlignmentJobCreate, most_workers
from services.client import recipes, tables
from services.client.api import Client
from services.client.bodies import PLACEHOLDERS, job_body, weights_of, workers_of
from services.client.connection import connect
from services.client.watch import watch
from services.errors import BadRequest, ServiceError

jobs = typer.Typer(no_args_is_help=True, help="Start and manage alignment jobs.")

COMMAND_ONLY = ("file", "recipe", "dry_run", "family", "gpu", "follow")
"""Parameters of `dde jobs create` that do not belong to the job's body."""


@jobs.command("create")
def create_job(
    ctx: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="The job as JSON or YAML.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name or id of the base model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of the dataset.")] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name for the aligned model. Default: made from base, method and job id."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"Alignment method: {', '.join(list(METHODS)[:-1])} or {list(METHODS)[-1]}."),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Value of objective.beta.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per global batch.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate after the warm-up.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of pairs and of adapters.")] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|LEAST-MOST",
            help="Number of workers; 1-4: elastic, as many as the cluster has room for.",
        ),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Where it runs: shared, or own, a Ray cluster for each stage.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Source of the reference errors: auto, ledger or online.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Held-out prompts, one per line: a path or a URI.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Number of held-out prompts.")] = None,
    rollout_prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompts that an on-policy method draws its pairs for: a path or a URI, or captions:DATASET."
        ),
    ] = None,
    num_rollout_prompts: Annotated[int | None, typer.Option(help="Number of such prompts.")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORER[=WEIGHT]", help="A scorer of an on-policy method's reward. Repeatable; weight 1."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe to start from; file and options override it. See `dde recipes`."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the job and an estimate of memory and time; submit nothing."),
    ] = False,
    family: Annotated[
        str | None, typer.Option(help="With --dry-run: model family, sd15 or sdxl. Default: the recipe's.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="With --dry-run: GPU type, a100, h100 or h200. Default: a100.")
    ] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch the job until it ends.")] = False,
) -> None:
    """Start a job; prints its id. Options override the file, and the file overrides the recipe."""
    options = {key: value for key, value in ctx.params.items() if key not in COMMAND_ONLY}
    options["workers"] = workers_of(workers) if workers else None
    options["reward"] = weights_of(reward) if reward else None
    base = recipes.load(recipe) if recipe else None
    start = recipes.merged(PLACEHOLDERS if dry_run else {}, base.job if base else {})
    body = job_body(file, options, start, dry_run)
    if dry_run:
        return _dry_run(body, family or (base.family if base else None), gpu or "a100")
    for option, value in (("family", family), ("gpu", gpu)):
        if value is not None:
            raise BadRequest(f"--{option} {value} is only allowed with --dry-run", param=option)
    with connect() as client:
        job = client.create_job(body)
        typer.echo(job.id)
        if follow:
            _follow(client, job.id)


def _dry_run(body: AlignmentJobCreate, family: str | None, gpu: str) -> None:
    """Print the job as it would be submitted, and if the family is known, an estimate of memory and time."""
    needed = None
    if family:
        needed = estimate(family, body.objective, body.training, most_workers(body.workers), gpu)
    if body.dataset is None and not METHODS[body.objective.method].on_policy:
        body = body.model_copy(update={"dataset": "DATASET"})
    typer.echo(body.model_dump_json(indent=2, exclude_none=True))
    if needed is None:
        typer.echo("no estimate: model family required: pass --recipe or --family (sd15 or sdxl)")
        return
    Console().print("", tables.memory(needed), "", tables.gpu_time(needed), sep="\n")


@jobs.command("list")
def list_jobs(status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None) -> None:
    """List all jobs."""
    with connect() as client:
        rows = [
            (j.id, j.state, j.stage or "", j.name, tables.local_time(j.created_at), tables.wait(j.waiting))
            for j in client.jobs(status)
        ]
    tables.print_list(Console(), ("id", "status", "stage", "name", "created", "waits for room"), rows)


@jobs.command("watch")
def watch_job(job: str) -> None:
    """Show progress until the job ends; exit code 1 unless it succeeded. Ctrl-C does not stop the job."""
    with connect() as client:
        _follow(client, job)


@jobs.command("cancel")
def cancel_job(job: str) -> None:
    """Cancel a job; prints its status."""
    with connect() as client:
        typer.echo(client.cancel_job(job).status)


@jobs.command("pause")
def pause_job(job: str) -> None:
    """Checkpoint a job and free its resources until it is resumed; prints its status."""
    with connect() as client:
        typer.echo(client.pause_job(job).state)


@jobs.command("resume")
def resume_job(job: str) -> None:
    """Continue a paused or failed job from its last state; prints its status."""
    with connect() as client:
        typer.echo(client.resume_job(job).state)


@jobs.command("checkpoints")
def list_checkpoints(job: str) -> None:
    """List a job's training checkpoints with their validation metrics."""
    with connect() as client:
        rows = [tables.checkpoint_row(each) for each in client.checkpoints(job)]
    tables.print_list(Console(), tables.CHECKPOINT_COLUMNS, rows)


def _follow(client: Client, job_id: str) -> None:
    console = Console()
    job = watch(client, job_id, console)
    if job.result.evaluate:
        console.print(tables.comparison(job.result.evaluate, job.name))
    if job.status != "succeeded":
        raise ServiceError(tables.outcome_line(job) + _how_to_resume(job))


def _how_to_resume(job: JobView) -> str:
    """The command that continues a failed job; empty if the job cannot be resumed."""
    if job.status != "failed" or job.stage is None:
        return ""
    resumed_from = "its last checkpoint" if job.stage == "train" else f"stage {job.stage}"
    return f"; fix the cause, then continue from {resumed_from} with `dde jobs resume {job.id}`"
