"""``dde jobs``: start alignment jobs, watch them, pause and end them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dde_core.planning.estimate import estimate
from services.api.requests import AlignmentJobCreate, most_workers
from services.client import recipes, tables
from services.client.api import Client
from services.client.bodies import TO_BE_NAMED, job_body, workers_of
from services.client.connection import connect
from services.client.types import Job
from services.client.watch import watch
from services.errors import BadRequest, ServiceError

jobs = typer.Typer(no_args_is_help=True, help="Alignment jobs.")

NOT_OF_THE_BODY = ("file", "recipe", "dry_run", "family", "gpu", "follow")
"""Parameters of `dde jobs create` that are no fields of a job."""


@jobs.command("create")
def create_job(
    ctx: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="The body as JSON or YAML.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name or id of the base model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of the dataset.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the aligned model.")] = None,
    method: Annotated[
        str | None, typer.Option(help="dde, dde_single, dde_step, uniform, discounted or sft.")
    ] = None,
    beta: float | None = None,
    steps: int | None = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs of the global batch.")] = None,
    learning_rate: float | None = None,
    checkpoint_every: int | None = None,
    seed: int | None = None,
    workers: Annotated[
        str | None,
        typer.Option(metavar="N|LEAST-MOST", help="1-4: as many of these as the cluster has, at any time."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="auto, ledger or online: where its errors come from.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="Held-out prompts, one a line: path or URI.")] = None,
    num_prompts: int | None = None,
    recipe: Annotated[
        str | None, typer.Option(help="What the file and the options change: see `dde recipes`.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Post nothing: show the body, and what the run needs.")
    ] = False,
    family: Annotated[
        str | None, typer.Option(help="sd15 or sdxl, for a dry run; default: the recipe's.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="a100, h100 or h200, for a dry run; default: a100.")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch the job until it ends.")] = False,
) -> None:
    """Start a job. Options go before what the file says, and that before the recipe."""
    options = {key: value for key, value in ctx.params.items() if key not in NOT_OF_THE_BODY}
    options["workers"] = workers_of(workers) if workers else None
    base = recipes.load(recipe) if recipe else None
    body = job_body(file, options, recipes.merged(TO_BE_NAMED if dry_run else {}, base.job if base else {}))
    if dry_run:
        return _dry_run(body, family or (base.family if base else None), gpu or "a100")
    for option, value in (("family", family), ("gpu", gpu)):
        if value is not None:
            raise BadRequest(f"--{option} {value} is read by --dry-run alone", param=option)
    with connect() as client:
        job = client.create_job(body)
        typer.echo(job.id)
        if follow:
            _follow(client, job.id)


def _dry_run(body: AlignmentJobCreate, family: str | None, gpu: str) -> None:
    """The body as it would be posted, and where the family is known, memory and time of its training."""
    needed = (
        estimate(family, body.objective, body.training, most_workers(body.workers), gpu) if family else None
    )
    typer.echo(body.model_dump_json(indent=2, exclude_none=True))
    if needed is None:
        typer.echo("no estimate: whose memory and time? --recipe says it, or --family sd15 or sdxl")
        return
    Console().print("", tables.memory(needed), "", tables.gpu_time(needed), sep="\n")


@jobs.command("list")
def list_jobs(status: Annotated[str | None, typer.Option(help="Only those that stand so.")] = None) -> None:
    """Every job."""
    with connect() as client:
        rows = [
            (j.id, j.state, j.stage or "", j.name or "", tables.moment(j.created_at))
            for j in client.jobs(status)
        ]
    tables.print_list(Console(), ("id", "status", "stage", "name", "created"), rows)


@jobs.command("watch")
def watch_job(job: str) -> None:
    """Show progress until the job ends; exit code 1 unless it succeeded. Ctrl-C ends the watching, not the job."""
    with connect() as client:
        _follow(client, job)


@jobs.command("cancel")
def cancel_job(job: str) -> None:
    """Stop a job."""
    with connect() as client:
        typer.echo(client.cancel_job(job).status)


@jobs.command("pause")
def pause_job(job: str) -> None:
    """Have a job store its state and free the cluster, until it is resumed."""
    with connect() as client:
        typer.echo(client.pause_job(job).state)


@jobs.command("resume")
def resume_job(job: str) -> None:
    """Let a paused or a failed job go on where it was."""
    with connect() as client:
        typer.echo(client.resume_job(job).state)


@jobs.command("checkpoints")
def list_checkpoints(job: str) -> None:
    """What a job's training has stored and kept."""
    with connect() as client:
        rows = [tables.checkpoint(each) for each in client.checkpoints(job)]
    tables.print_list(Console(), tables.CHECKPOINT, rows)


def _follow(client: Client, job_id: str) -> None:
    console = Console()
    job = watch(client, job_id, console)
    if job.result and job.result.evaluate:
        console.print(tables.comparison(job.result.evaluate, "its base", job.name or "aligned"))
    if job.status != "succeeded":
        raise ServiceError(
            f"{job.id} {job.status}" + (f": {job.reason}" if job.reason else "") + _way_on(job)
        )


def _way_on(job: Job) -> str:
    """What can be done about a failure: what is stored need not be done again."""
    if job.status != "failed" or job.stage is None:
        return ""
    stored = "its last checkpoint" if job.stage == "train" else f"stage {job.stage}"
    return f"; once the cause is gone, `dde jobs resume {job.id}` goes on from {stored}"
