"""The ``dde`` command; uses DDE_URL and DDE_API_KEY, else the system of `dde up` in DDE_HOME (``.dde``)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.core import TyperGroup

from dde_core.config import SamplerName
from dde_core.errors import DdeError
from services.api.images import ImageRequest
from services.api.records import CreditRecord
from services.api.requests import (
    MAX_IMAGES,
    EvaluationCreate,
    most_workers,
)
from services.client import recipes, tables
from services.client.bodies import PLACEHOLDERS, as_uri, job_body, read_body, validation_line
from services.client.connection import connect
from services.client.dataset_commands import datasets
from services.client.evaluation_commands import evaluations
from services.client.job_commands import jobs
from services.client.key_commands import keys
from services.client.model_commands import models
from services.client.scorer_commands import scorers
from services.client.study_commands import study
from services.errors import BadRequest, ServiceError
from services.settings import ClientSettings


class Commands(TyperGroup):
    """Reports an error as one line on stderr, with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ValidationError as error:
            print_error(validation_line(error))
        except (ServiceError, DdeError, OSError) as error:
            param = getattr(error, "param", None)
            names_its_field = not param or param in str(error)
            print_error(str(error) if names_its_field else f"{param}: {error}")
        raise typer.Exit(1)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Align text-to-image diffusion models with human preferences.",
)
app.add_typer(datasets, name="datasets")
app.add_typer(models, name="models")
app.add_typer(scorers, name="scorers")
app.add_typer(jobs, name="jobs")
app.add_typer(evaluations, name="evaluations")
app.add_typer(study, name="study")
app.add_typer(keys, name="keys")

Cpus = Annotated[
    int, typer.Option(min=1, help="CPUs that Ray may assign; each worker and replica takes one.")
]
SamplingSteps = Annotated[int, typer.Option(help="Sampling steps.")]
GuidanceScale = Annotated[float, typer.Option(help="Classifier-free guidance scale.")]


def print_error(line: str) -> None:
    """Print one line on stderr."""
    typer.echo(f"error: {line}", err=True)


# ---- the system on this machine


@app.command()
def up(
    state: Annotated[
        Path | None, typer.Option(help="Folder for the key, database, models and logs. Default: DDE_HOME.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the API. 0: 8080 if free, else any free port.")
    ] = 0,
    num_cpus: Cpus = 8,
    gpu: Annotated[bool, typer.Option(help="Give each worker a GPU.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Folder or s3://bucket from which pairs, prompts and models may be read, besides the state "
            "folder and this one. Repeatable.",
        ),
    ] = None,
) -> None:
    """Run the whole system on this machine until Ctrl-C, with a small base model to try."""
    from services.client.up import run_up

    run_up(
        Console(),
        state or ClientSettings().home,
        port=port,
        num_cpus=num_cpus,
        use_gpu=gpu,
        allow=[as_uri(root) for root in allow or ()],
    )


@app.command()
def demo(
    state: Annotated[
        Path | None, typer.Option(help="Folder for the demo, emptied first. Default: DDE_HOME/demo.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="dde, tailorpo or tailorpo_g: deploy/demo-METHOD.json.")
    ] = "dde",
    job: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Job file, in place of a method's.")
    ] = None,
    num_cpus: Cpus = 8,
    keep: Annotated[bool, typer.Option(help="Keep serving until Ctrl-C.")] = False,
) -> None:
    """Align, evaluate and serve a small model on this machine, and print the results."""
    from services.client.demo import job_file_of, run_demo

    file = job or job_file_of(method)
    run_demo(Console(), state or ClientSettings().home / "demo", job_file=file, num_cpus=num_cpus, keep=keep)


@app.command()
def smoke(
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Address of the installation. Default: DDE_URL.")
    ] = None,
    timeout_s: Annotated[
        float,
        typer.Option(min=1.0, help="Seconds for everything but the clean-up, waiting for room included."),
    ] = 1800.0,
) -> None:
    """Run a tiny job on an installation, check what it made, and delete it. Exit code 1 names what failed.

    The key (DDE_API_KEY) needs the scopes read, submit and generate.
    """
    from services.client.smoke import run_smoke

    settings = ClientSettings()
    run_smoke(Console(), base_url or settings.base_url, settings.key, timeout_s)


# ---- recipes, plans, credit


@app.command("recipes")
def list_recipes() -> None:
    """List the papers' training runs, for `dde jobs create --recipe NAME`."""
    rows = [(recipe.name, recipe.family, recipe.method, recipe.about) for recipe in recipes.all_recipes()]
    tables.print_list(Console(), ("name", "family", "method", "about"), rows)


@app.command()
def plan(
    file: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="The job as JSON or YAML.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe to start from; the file overrides it. See `dde recipes`.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Model family: sd15 or sdxl. Default: the recipe's.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Number of GPUs, one per worker. Default: the job's workers.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="GPU type: a100, h100 or h200.")] = "a100",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs in each node.")] = 8,
    interconnect: Annotated[
        float | None,
        typer.Option(help="GB/s between nodes per GPU, one way. Default: 25 for a100, else 50."),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(help="USD per GPU-hour. Default: a100 2, h100 3, h200 3.5."),
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Fraction of the compute time that hides communication, 0 to 1.")
    ] = 0.5,
    pairs: Annotated[
        int | None, typer.Option(help="Pairs in the dataset. Default: Pick-a-Pic's 851,293.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Measured speeds: the results.json of tests.bench.gpu_step."
        ),
    ] = None,
) -> None:
    """Estimate a job on a cluster: step time, communication, memory, data, checkpoints, hours and price."""
    from dde_core.planning.cluster import Cluster
    from dde_core.planning.plan import PICK_A_PIC_PAIRS
    from services.client import plan as planning

    base = recipes.load(recipe) if recipe else None
    body = job_body(file, {}, recipes.merged(PLACEHOLDERS, base.job if base else {}), True)
    family = family or (base.family if base else None)
    if not family:
        raise BadRequest("model family required: pass --recipe or --family (sd15 or sdxl)", param="family")
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
    method: Annotated[
        list[str] | None, typer.Option(help="Method to show. Repeatable. Default: all.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Margin of a pair, the same at every timestep.")] = 1e-4,
    beta: Annotated[float | None, typer.Option(help="Value of objective.beta.")] = None,
    t_min: Annotated[int | None, typer.Option(help="First trained timestep.")] = None,
    t_max: Annotated[int | None, typer.Option(help="Last trained timestep; 0: T.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Discount of the method discounted.")] = None,
    calibration_point: Annotated[
        str | None, typer.Option(help="Where log p/q is evaluated: expected, sampled or mode.")
    ] = None,
    calibration_bins: Annotated[
        int | None, typer.Option(help="Number of coefficients; 0: one per timestep.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pairs per global batch. Default: the job's, else 2048.")
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(help="Id of a trained job: use its objective and schedule, show its logged credit."),
    ] = None,
    scheduler: Annotated[
        Path | None,
        typer.Option(
            exists=True, help="A model's scheduler_config.json. Default: Stable Diffusion's schedule."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("credit.png"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the curves as JSON instead of drawing them.")
    ] = False,
) -> None:
    """Draw which timesteps get credit under each method; with --job, also where a job's training put it."""
    fields: dict[str, Any] = {"beta": beta, "t_min": t_min, "t_max": t_max, "gamma": gamma}
    fields |= {"calibration_point": calibration_point, "calibration_bins": calibration_bins}
    if job and scheduler:
        raise BadRequest(
            f"--scheduler {scheduler} conflicts with --job, whose schedule is used: pass only one of them",
            param="scheduler",
        )
    try:
        from dde_core.credit import STABLE_DIFFUSION
        from services.client import credit as report

        record = _credit_record(job) if job else None
        config = read_body(scheduler) if scheduler else STABLE_DIFFUSION
        computed = report.compute(record, method or [], margin, batch_size, fields, config)
        if as_json:
            typer.echo(report.as_json(computed))
        else:
            report.show(computed, Console(), out)
    except ModuleNotFoundError as error:
        missing = str(error.name).split(".")[0]
        raise ServiceError(f"dde credit needs {missing}: pip install 'dde-align[credit]'") from error


@app.command("rollout-check")
def rollout_check(
    scorer: Annotated[str, typer.Option(help="KIND of a built-in scorer, or KIND=CHECKPOINT.")],
    model: Annotated[
        Path | None, typer.Option(exists=True, help="A diffusers folder. Default: shapes.")
    ] = None,
    processor: Annotated[
        Path | None,
        typer.Option(exists=True, help="The scorer's tokenizer and image settings, if elsewhere."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(exists=True, help="Prompts, one a line.")] = None,
    num_prompts: Annotated[int, typer.Option(min=3, help="Prompts to use.")] = 48,
    completions: Annotated[int, typer.Option(min=1, help="Images that each candidate is completed to.")] = 6,
    t_min: Annotated[int, typer.Option(help="Least t of the transitions.")] = 500,
    t_max: Annotated[int, typer.Option(help="Greatest t of the transitions; 0: T.")] = 0,
    every: Annotated[int, typer.Option(min=1, help="Measure every n-th transition.")] = 2,
    guidance_scale: GuidanceScale = 5.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure how far ahead tailorpo must look with a scorer: the value of objective.lookahead."""
    from dde_core.config import ObjectiveConfig
    from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
    from services.artifacts.prompts import read_prompts
    from services.client import rollout_check as checking

    objective = ObjectiveConfig(
        method="tailorpo", beta=10.0, guidance_scale=guidance_scale, t_min=t_min, t_max=t_max
    )
    read = read_prompts(as_uri(str(prompts or PROMPTS_FILE)), num_prompts)
    loaded = checking.make_scorer(scorer, processor, device)
    captions = [prompt.text for prompt in read]
    folder = model or MODEL_DIR
    checking.check(folder, loaded, captions, objective, every, completions, device, Console())


def _credit_record(job_id: str) -> CreditRecord:
    with connect() as client:
        return client.credit(job_id)


# ---- images and evaluations


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Name or id of the model.")],
    prompt: Annotated[str, typer.Argument(help="Text of the prompt.")],
    n: Annotated[int, typer.Option("-n", min=1, max=MAX_IMAGES, help="Number of images.")] = 1,
    negative: Annotated[str, typer.Option(help="Text of what the images should not show.")] = "",
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first image; each next image adds 1. Default: fresh."),
    ] = None,
    sampler: Annotated[str, typer.Option(help=f"One of {', '.join(get_args(SamplerName))}.")] = "ddim",
    steps: SamplingSteps = 25,
    guidance_scale: GuidanceScale = 5.0,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT, or auto for the model's own size.")] = "auto",
    output_format: Annotated[str, typer.Option("--format", help="png, jpeg or webp.")] = "png",
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path(),
) -> None:
    """Generate images; the image of seed S is written to MODEL-S.png. Prints each file with its seed."""
    body = {
        "model": model,
        "prompt": prompt,
        "negative_prompt": negative,
        "n": n,
        "size": size,
        "seed": seed,
        "sampler": sampler,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "output_format": output_format,
    }
    request = ImageRequest.model_validate(body)
    with connect() as client:
        answer = client.generate(request)
    out.mkdir(parents=True, exist_ok=True)
    for image in answer.data:
        path = out / f"{model}-{image.seed}.{answer.output_format}"
        path.write_bytes(image.content)
        typer.echo(f"{path} seed {image.seed}")
    for warning in answer.warnings:
        typer.echo(warning, err=True)


def _compared(text: str) -> str | dict[str, str]:
    """``NAME=FOLDER`` as the body of a folder of images, ``NAME=ID`` as that of a model under another name;
    anything else is a model's name or id.
    """
    name, equals, what = text.partition("=")
    if not equals:
        return text
    if re.fullmatch(r"model_[0-9a-f]+", what):
        return {"name": name, "model": what}
    return {"name": name, "images_uri": as_uri(what)}


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two or more: names or ids of models, NAME=ID for a model under another name, NAME=FOLDER "
            "for images drawn elsewhere.",
            show_default=False,
        ),
    ],
    prompts: Annotated[str, typer.Option(help="Held-out prompts: a path or a URI.")],
    base: Annotated[
        str | None, typer.Option(help="The model that the others are compared with; by default the first.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Number of prompts, from the top of the file.")] = 200,
    images_per_prompt: Annotated[int, typer.Option(help="Images of each prompt by each model.")] = 1,
    scorers: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer", help="A registered scorer; give it several times. Default: those of shapes."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; each next prompt adds 1.")] = 0,
    steps: SamplingSteps = 25,
    guidance_scale: GuidanceScale = 5.0,
) -> None:
    """Compare models on held-out prompts, with the same seeds."""
    body = {
        "models": [_compared(model) for model in models],
        "base": base,
        "prompts_uri": as_uri(prompts),
        "num_prompts": num_prompts,
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "sample": {"steps": steps, "guidance_scale": guidance_scale},
    } | ({"scorers": scorers} if scorers else {})
    request = EvaluationCreate.model_validate_json(json.dumps(body))
    with connect() as client:
        evaluation = client.wait_evaluation(client.create_evaluation(request).id)
    if evaluation.result is None or evaluation.status != "succeeded":
        raise ServiceError(tables.outcome_line(evaluation))
    console = Console()
    for compared in evaluation.models:
        if compared.name != evaluation.base:
            console.print(tables.comparison(evaluation.result, compared.name))
    for sentence in evaluation.result.summary:
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"report {evaluation.result.page}\nnumbers {evaluation.result.report}\n"
        f"images {evaluation.result.grid}",
        soft_wrap=True,
        highlight=False,
    )
