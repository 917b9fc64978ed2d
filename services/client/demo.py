"""`dde demo`: one job from preference pairs to a served model, on this machine, all over HTTP."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from rich.console import Console

from dde_core.shapes import PAIRS_FILE, PROMPTS_FILE
from services.api.answers import JobView
from services.api.images import ImageRequest
from services.api.records import EvaluateResult
from services.api.requests import CAPTIONS, AlignmentJobCreate
from services.client import tables
from services.client.api import Client
from services.client.bodies import job_body, read_body
from services.client.local import LocalSystem
from services.client.processes import executables
from services.client.up import (
    BASE_MODEL,
    first_prompt,
    generate_command,
    register_base,
    run_until_interrupted,
    signals_interrupt,
)
from services.client.watch import watch
from services.errors import BadRequest, ServiceError

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def job_file_of(method: str) -> Path:
    """The demo's job with this method. Raises BadRequest if there is none."""
    file = DEPLOY / ("demo.json" if method == "dde" else f"demo-{method}.json")
    if not file.exists():
        named = [each.stem.removeprefix("demo-") for each in sorted(DEPLOY.glob("demo-*.json"))]
        message = f"method must be one of {', '.join(['dde', *named])}, or give a job file, got {method!r}"
        raise BadRequest(message, param="method")
    return file


def run_demo(console: Console, state: Path, *, job_file: Path, num_cpus: int, keep: bool) -> None:
    """Run one job and print its results in a fresh system. Raises ServiceError unless the job succeeds."""
    began = time.monotonic()
    with signals_interrupt(), ExitStack() as stack:
        system = stack.enter_context(LocalSystem(state, fresh=True, num_cpus=num_cpus, report=console.print))
        client = stack.enter_context(system.client())
        seconds = {"start-up": time.monotonic() - began}
        console.print(
            f"the API is at {system.url}, logs are in {system.logs}", soft_wrap=True, highlight=False
        )

        request = prepare(client, job_file)
        job = watch(client, client.create_job(request).id, console)
        result = evaluation_of(job)
        seconds |= {stage: float(value) for stage, value in job.stage_seconds.items() if value is not None}

        requested = time.monotonic()
        image = generate_image(client, job.name, request, system.state)
        seconds["first generation"] = time.monotonic() - requested
        seconds["total"] = time.monotonic() - began

        grid = copy_grid(result, system.state)
        show(console, job, result, seconds, [grid, image], system.state)
        write_summary(system.state / "summary.json", job, result, seconds)
        if keep:
            key = f"export DDE_URL={system.url} DDE_API_KEY=$(cat {system.key_file})"
            console.print(f"serving until Ctrl-C\n  {key}", markup=False, highlight=False, soft_wrap=True)
            run_until_interrupted(system)


def prepare(client: Client, job_file: Path) -> AlignmentJobCreate:
    """Register the shipped model and pairs. Returns the file's job with dataset and prompts filled in.

    A job with rollouts gets the captions of the pairs, and none of their images.
    """
    register_base(client)
    dataset = client.create_dataset(f"{BASE_MODEL}-pairs", PAIRS_FILE.as_uri())
    options = {"prompts": PROMPTS_FILE.as_uri()}
    if "rollouts" in read_body(job_file):
        options["rollout_prompts"] = f"{CAPTIONS}{dataset.id}"
    else:
        options["dataset"] = dataset.id
    return job_body(job_file, options)


def evaluation_of(job: JobView) -> EvaluateResult:
    """The evaluation of a job that succeeded. Raises ServiceError with the reason if it did not."""
    if job.status != "succeeded" or job.result.evaluate is None:
        raise ServiceError(tables.outcome_line(job))
    return job.result.evaluate


def generate_image(client: Client, model: str, request: AlignmentJobCreate, folder: Path) -> Path:
    """Generate one image with the aligned model and the evaluation's sampling settings; returns its file."""
    sample = request.evaluation.sample
    image_request = ImageRequest(
        model=model, prompt=first_prompt(), steps=sample.steps, guidance_scale=sample.guidance_scale
    )
    path = folder / "picture.png"
    path.write_bytes(client.generate(image_request).data[0].content)
    return path


def copy_grid(result: EvaluateResult, folder: Path) -> Path:
    """Copy the image grid to the top of the state folder. The demo's storage is a local folder."""
    return Path(shutil.copyfile(url2pathname(urlsplit(result.grid).path), folder / "grid.png"))


def show(
    console: Console,
    job: JobView,
    result: EvaluateResult,
    seconds: dict[str, float],
    images: list[Path],
    state: Path,
) -> None:
    """Print the tables, the image files, and the commands that serve the model again and generate with it."""
    console.print(tables.comparison(result, job.name))
    console.print()
    console.print(tables.durations(seconds))
    lines = [
        *map(str, images),
        f"{job.name} is stored; to serve it again: {executables() / 'dde'} up --state {state}",
        "to generate an image while it is served:",
        f"  {generate_command(job.name, state)}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def write_summary(path: Path, job: JobView, result: EvaluateResult, seconds: dict[str, float]) -> None:
    """Write the numbers of the tables as JSON, to compare runs."""
    train = job.result.train
    summary = {
        "model": job.name,
        "num_prompts": result.num_prompts,
        "scores": {name: scores[job.name].model_dump() for name, scores in result.scores.items()},
        "training": train.metrics if train else {},
        "seconds": seconds,
    }
    path.write_text(json.dumps(summary, indent=1) + "\n")
