"""The ``dde`` command. Where it finds the system: DDE_URL and DDE_API_KEY, else what `dde up` left in DDE_HOME (``.dde``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.core import TyperGroup

from dde_core.errors import DdeError
from dde_core.estimate import estimate
from services.client import recipes, tables
from services.client.api import Client
from services.client.bodies import as_uri, columns_of, job_body, read_body, validation_line
from services.client.watch import watch
from services.contracts import AlignmentJobCreate, CreditRecord, EvaluationCreate, ImageRequest, most_workers
from services.errors import BadRequest, ServiceError
from services.settings import ClientSettings


class Commands(TyperGroup):
    """Says what went wrong in one line on stderr, exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ValidationError as error:
            complain(validation_line(error))
        except (ServiceError, DdeError, OSError) as error:
            param = getattr(error, "param", None)
            complain(str(error) if not param or param in str(error) else f"{param}: {error}")
        raise typer.Exit(1)


app = typer.Typer(
    cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, help="Preference alignment of diffusion models."
)
datasets = typer.Typer(no_args_is_help=True, help="Preference pairs.")
models = typer.Typer(no_args_is_help=True, help="Base models and aligned ones.")
jobs = typer.Typer(no_args_is_help=True, help="Alignment jobs.")
app.add_typer(datasets, name="datasets")
app.add_typer(models, name="models")
app.add_typer(jobs, name="jobs")

NOT_OF_THE_BODY = ("file", "recipe", "dry_run", "family", "gpu", "follow")
"""Parameters of `dde jobs create` that are no fields of a job."""

TO_BE_NAMED = {"model": "MODEL", "dataset": "DATASET", "evaluation": {"prompts_uri": "PROMPTS"}}
"""What a dry run does not have to be told."""

PairsUri = Annotated[str, typer.Argument(help="Parquet, JSON lines, a Hugging Face or win/lose folder: path or URI.")]
ColumnOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=COLUMN", help="What the files call a column: caption=prompt. Repeatable.")
]
Cpus = Annotated[int, typer.Option(min=1, help="What Ray may hand out: workers and replicas ask for one each.")]


def complain(line: str) -> None:
    """One line on stderr."""
    typer.echo(f"error: {line}", err=True)


def connect() -> Client:
    """A client of the system that the environment names."""
    settings = ClientSettings()
    return Client(settings.base_url, settings.key)


# ---- the system on this machine


@app.command()
def up(
    state: Annotated[Path | None, typer.Option(help="Folder for key, database, models and logs; default DDE_HOME.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the API; 0: 8080 where that is free.")] = 0,
    num_cpus: Cpus = 8,
    gpu: Annotated[bool, typer.Option(help="Give each worker a GPU.")] = False,
) -> None:
    """Start everything on this machine, with a small base model to try, until Ctrl-C."""
    from services.client.up import run_up

    run_up(Console(), state or ClientSettings().home, port=port, num_cpus=num_cpus, use_gpu=gpu)


@app.command()
def demo(
    state: Annotated[Path | None, typer.Option(help="Folder for all of it, emptied first; default DDE_HOME/demo.")] = None,
    job: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Another job than deploy/demo.json.")] = None,
    num_cpus: Cpus = 8,
    keep: Annotated[bool, typer.Option(help="Go on serving until Ctrl-C.")] = False,
) -> None:
    """Align, evaluate and serve a small model on this machine, and show what it brought."""
    from services.client.demo import run_demo

    run_demo(Console(), state or ClientSettings().home / "demo", job_file=job, num_cpus=num_cpus, keep=keep)


# ---- what is registered


@datasets.command("create")
def create_dataset(name: str, uri: PairsUri, column: ColumnOption = None) -> None:
    """Register preference pairs."""
    with connect() as client:
        made = client.create_dataset(name, as_uri(uri), columns_of(column or ()))
    typer.echo(made.id)
    if made.counts:
        typer.echo(tables.counted(made.counts), err=True)


@datasets.command("validate")
def validate_dataset(uri: PairsUri, column: ColumnOption = None) -> None:
    """Read a sample of the rows and their pictures, and say what is there; nothing is stored."""
    with connect() as client:
        report = client.validate_dataset(as_uri(uri), columns_of(column or ()))
    tables.print_report(Console(), report)
    if not report.sampled["decided"]:
        raise typer.Exit(1)


@datasets.command("list")
def list_datasets() -> None:
    """Every dataset."""
    with connect() as client:
        rows = [
            (d.id, d.name, d.counts.pairs if d.counts else "", d.uri, tables.moment(d.created_at)) for d in client.datasets()
        ]
    tables.print_list(Console(), ("id", "name", "pairs", "uri", "created"), rows)


@models.command("create")
def create_model(
    name: str,
    uri: Annotated[str, typer.Argument(help="A diffusers folder: path or URI.")],
    family: Annotated[str | None, typer.Option(help="sd15 or sdxl: refuse a folder of the other.")] = None,
) -> None:
    """Register a base model."""
    with connect() as client:
        typer.echo(client.create_model(name, as_uri(uri), family).id)


@models.command("list")
def list_models() -> None:
    """Every model."""
    with connect() as client:
        rows = [(m.id, m.name, m.family, m.base or "", m.job or "", tables.moment(m.created_at)) for m in client.models()]
    tables.print_list(Console(), ("id", "name", "family", "base", "job", "created"), rows)


# ---- jobs


@app.command("recipes")
def list_recipes() -> None:
    """The runs of the papers, ready for `dde jobs create --recipe NAME`."""
    rows = [(recipe.name, recipe.family, recipe.method, recipe.about) for recipe in recipes.all_recipes()]
    tables.print_list(Console(), ("name", "family", "method", "about"), rows)


@jobs.command("create")
def create_job(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Argument(exists=True, dir_okay=False, help="The body as JSON or YAML.")] = None,
    model: Annotated[str | None, typer.Option(help="Name or id of the base model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of the dataset.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the aligned model.")] = None,
    method: Annotated[str | None, typer.Option(help="dde, dde_single, dde_step, uniform, discounted or sft.")] = None,
    beta: float | None = None,
    steps: int | None = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs of the global batch.")] = None,
    learning_rate: float | None = None,
    checkpoint_every: int | None = None,
    seed: int | None = None,
    workers: int | None = None,
    prompts: Annotated[str | None, typer.Option(help="Held-out prompts, one a line: path or URI.")] = None,
    num_prompts: int | None = None,
    recipe: Annotated[str | None, typer.Option(help="What the file and the options change: see `dde recipes`.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Post nothing: show the body, and what the run needs.")] = False,
    family: Annotated[str | None, typer.Option(help="sd15 or sdxl, for a dry run; default: the recipe's.")] = None,
    gpu: Annotated[str | None, typer.Option(help="a100, h100 or h200, for a dry run; default: a100.")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch the job until it ends.")] = False,
) -> None:
    """Start a job. Options go before what the file says, and that before the recipe."""
    options = {key: value for key, value in ctx.params.items() if key not in NOT_OF_THE_BODY}
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
    needed = estimate(family, body.objective, body.training, most_workers(body.workers), gpu) if family else None
    typer.echo(body.model_dump_json(indent=2, exclude_none=True))
    if needed is None:
        typer.echo("no estimate: whose memory and time? --recipe says it, or --family sd15 or sdxl")
        return
    Console().print("", tables.memory(needed), "", tables.gpu_time(needed), sep="\n")


@jobs.command("list")
def list_jobs(status: Annotated[str | None, typer.Option(help="Only those that stand so.")] = None) -> None:
    """Every job."""
    with connect() as client:
        rows = [(j.id, j.status, j.stage or "", j.name or "", tables.moment(j.created_at)) for j in client.jobs(status)]
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


@app.command()
def credit(
    method: Annotated[list[str] | None, typer.Option(help="May be repeated; default: every method.")] = None,
    margin: Annotated[float, typer.Option(help="The margin of errors, the same at every timestep.")] = 1e-4,
    beta: float | None = None,
    t_min: int | None = None,
    t_max: int | None = None,
    gamma: float | None = None,
    calibration_point: Annotated[str | None, typer.Option(help="expected, sampled or mode.")] = None,
    calibration_bins: int | None = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs of the global batch; default: the job's, else 2048.")] = None,
    job: Annotated[
        str | None, typer.Option(help="A job that is trained: its objective and schedule, and what it logged.")
    ] = None,
    scheduler: Annotated[
        Path | None, typer.Option(exists=True, help="A model's scheduler_config.json; default: Stable Diffusion's schedule.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG file.")] = Path("credit.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the curves, and draw nothing.")] = False,
) -> None:
    """Show to which timesteps each method gives credit; with --job, where a job's training put it."""
    fields: dict[str, Any] = {"beta": beta, "t_min": t_min, "t_max": t_max, "gamma": gamma}
    fields |= {"calibration_point": calibration_point, "calibration_bins": calibration_bins}
    if job and scheduler:
        raise BadRequest(f"--scheduler {scheduler} is not read with --job, which has its own", param="scheduler")
    try:
        from services.client import credit as drawing

        record = _credit_record(job) if job else None
        config = read_body(scheduler) if scheduler else drawing.STABLE_DIFFUSION
        computed = drawing.compute(record, method or [], margin, batch_size, fields, config)
        if as_json:
            typer.echo(drawing.as_json(computed))
        else:
            drawing.show(computed, Console(), out)
    except ModuleNotFoundError as error:
        missing = str(error.name).split(".")[0]
        raise ServiceError(f"dde credit needs {missing}: pip install 'dde-align[credit]'") from error


def _credit_record(job_id: str) -> CreditRecord:
    with connect() as client:
        return client.credit(job_id)


def _follow(client: Client, job_id: str) -> None:
    console = Console()
    job = watch(client, job_id, console)
    if job.result and job.result.evaluate:
        console.print(tables.comparison(job.result.evaluate, "its base", job.name or "aligned"))
    if job.status != "succeeded":
        raise ServiceError(f"{job.id} {job.status}" + (f": {job.reason}" if job.reason else ""))


# ---- pictures


@app.command()
def generate(
    model: str,
    prompt: str,
    n: Annotated[int, typer.Option("-n", min=1, max=16, help="How many pictures.")] = 1,
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 5.0,
    size: Annotated[str, typer.Option(help='WIDTHxHEIGHT, or "auto": the model\'s own.')] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path(),
) -> None:
    """Draw pictures; the one of seed S is written to MODEL-S.png."""
    request = ImageRequest(model=model, prompt=prompt, n=n, size=size, seed=seed, steps=steps, guidance_scale=guidance_scale)
    with connect() as client:
        pictures = client.generate(request)
    out.mkdir(parents=True, exist_ok=True)
    for offset, picture in enumerate(pictures):
        path = out / f"{model}-{seed + offset}.png"
        path.write_bytes(picture)
        typer.echo(path)


@app.command()
def evaluate(
    model: str,
    base: str,
    prompts: Annotated[str, typer.Option(help="Held-out prompts, one a line: path or URI.")],
    num_prompts: int = 200,
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 5.0,
) -> None:
    """Compare two models on held-out prompts."""
    sample = {"steps": steps, "guidance_scale": guidance_scale}
    body = {"model": model, "base": base, "num_prompts": num_prompts, "seed": seed, "sample": sample}
    request = EvaluationCreate.model_validate_json(json.dumps({**body, "prompts_uri": as_uri(prompts)}))
    with connect() as client:
        evaluation = client.wait_evaluation(client.create_evaluation(request).id)
    if evaluation.result is None or evaluation.status != "succeeded":
        raise ServiceError(f"{evaluation.id} {evaluation.status}" + (f": {evaluation.reason}" if evaluation.reason else ""))
    console = Console()
    console.print(tables.comparison(evaluation.result, base, model))
    console.print(f"report {evaluation.result.report}\npictures {evaluation.result.grid}", soft_wrap=True, highlight=False)
