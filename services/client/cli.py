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
from services.api.records import CreditRecord
from services.api.requests import EvaluationCreate, ImageRequest, most_workers
from services.client import recipes, tables
from services.client.bodies import TO_BE_NAMED, as_uri, columns_of, job_body, read_body, validation_line
from services.client.connection import connect
from services.client.job_commands import jobs
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
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Preference alignment of diffusion models.",
)
datasets = typer.Typer(no_args_is_help=True, help="Preference pairs.")
models = typer.Typer(no_args_is_help=True, help="Base models and aligned ones.")
app.add_typer(datasets, name="datasets")
app.add_typer(models, name="models")
app.add_typer(jobs, name="jobs")

PairsUri = Annotated[
    str, typer.Argument(help="Parquet, JSON lines, a Hugging Face or win/lose folder: path or URI.")
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=COLUMN", help="What the files call a column: caption=prompt. Repeatable."),
]
Cpus = Annotated[
    int, typer.Option(min=1, help="What Ray may hand out: workers and replicas ask for one each.")
]


def complain(line: str) -> None:
    """One line on stderr."""
    typer.echo(f"error: {line}", err=True)


# ---- the system on this machine


@app.command()
def up(
    state: Annotated[
        Path | None, typer.Option(help="Folder for key, database, models and logs; default DDE_HOME.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the API; 0: 8080 where that is free.")] = 0,
    num_cpus: Cpus = 8,
    gpu: Annotated[bool, typer.Option(help="Give each worker a GPU.")] = False,
) -> None:
    """Start everything on this machine, with a small base model to try, until Ctrl-C."""
    from services.client.up import run_up

    run_up(Console(), state or ClientSettings().home, port=port, num_cpus=num_cpus, use_gpu=gpu)


@app.command()
def demo(
    state: Annotated[
        Path | None, typer.Option(help="Folder for all of it, emptied first; default DDE_HOME/demo.")
    ] = None,
    job: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Another job than deploy/demo.json.")
    ] = None,
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
            (d.id, d.name, d.counts.pairs if d.counts else "", d.uri, tables.moment(d.created_at))
            for d in client.datasets()
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
        rows = [
            (m.id, m.name, m.family, m.base or "", m.job or "", tables.moment(m.created_at))
            for m in client.models()
        ]
    tables.print_list(Console(), ("id", "name", "family", "base", "job", "created"), rows)


# ---- runs


@app.command("recipes")
def list_recipes() -> None:
    """The runs of the papers, ready for `dde jobs create --recipe NAME`."""
    rows = [(recipe.name, recipe.family, recipe.method, recipe.about) for recipe in recipes.all_recipes()]
    tables.print_list(Console(), ("name", "family", "method", "about"), rows)


@app.command()
def plan(
    file: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="A job's body as JSON or YAML.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="What the file changes: see `dde recipes`.")] = None,
    family: Annotated[str | None, typer.Option(help="sd15 or sdxl; default: the recipe's.")] = None,
    gpus: Annotated[int | None, typer.Option(help="One a worker; default: the job's workers.")] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100 or h200.")] = "a100",
    gpus_per_node: int = 8,
    interconnect: Annotated[
        float | None,
        typer.Option(help="GB/s between nodes for each GPU, one way; default: 25 of an a100, else 50."),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(help="USD a GPU-hour; default: 2 of an a100, 3 of an h100, 3.5 of an h200."),
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="The part of the arithmetic that hides exchange behind it, 0 to 1.")
    ] = 0.5,
    pairs: Annotated[int | None, typer.Option(help="Of the dataset; default: Pick-a-Pic's 851,293.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Measured speeds: results.json of tests.bench.gpu_step."
        ),
    ] = None,
) -> None:
    """Show what a job would take on a cluster: step time, exchange, memory, data, checkpoints, hours and price."""
    from dde_core.planning.cluster import Cluster
    from dde_core.planning.plan import PICK_A_PIC_PAIRS
    from services.client import plan as planning

    base = recipes.load(recipe) if recipe else None
    body = job_body(file, {}, recipes.merged(TO_BE_NAMED, base.job if base else {}))
    if not (family := family or (base.family if base else None)):
        raise BadRequest("whose plan? --recipe says it, or --family sd15 or sdxl", param="family")
    cluster = Cluster(
        gpus=most_workers(body.workers) if gpus is None else gpus,
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        interconnect_gb_s=interconnect,
        price_usd=price,
        overlap=overlap,
    )
    results = read_body(calibration) if calibration else None
    planning.show(Console(), body, family, cluster, results, PICK_A_PIC_PAIRS if pairs is None else pairs)


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
    batch_size: Annotated[
        int | None, typer.Option(help="Pairs of the global batch; default: the job's, else 2048.")
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(help="A job that is trained: its objective and schedule, and what it logged."),
    ] = None,
    scheduler: Annotated[
        Path | None,
        typer.Option(
            exists=True, help="A model's scheduler_config.json; default: Stable Diffusion's schedule."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG file.")] = Path("credit.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the curves, and draw nothing.")] = False,
) -> None:
    """Show to which timesteps each method gives credit; with --job, where a job's training put it."""
    fields: dict[str, Any] = {"beta": beta, "t_min": t_min, "t_max": t_max, "gamma": gamma}
    fields |= {"calibration_point": calibration_point, "calibration_bins": calibration_bins}
    if job and scheduler:
        raise BadRequest(
            f"--scheduler {scheduler} is not read with --job, which has its own", param="scheduler"
        )
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
    request = ImageRequest(
        model=model, prompt=prompt, n=n, size=size, seed=seed, steps=steps, guidance_scale=guidance_scale
    )
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
        raise ServiceError(
            f"{evaluation.id} {evaluation.status}" + (f": {evaluation.reason}" if evaluation.reason else "")
        )
    console = Console()
    console.print(tables.comparison(evaluation.result, base, model))
    console.print(
        f"report {evaluation.result.report}\npictures {evaluation.result.grid}",
        soft_wrap=True,
        highlight=False,
    )
