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
from services.api.records import EvaluateResult
from services.api.requests import AlignmentJobCreate, ImageRequest
from services.client import tables
from services.client.api import Client
from services.client.bodies import job_body
from services.client.local import LocalSystem
from services.client.processes import executables
from services.client.types import Job
from services.client.up import (
    BASE_MODEL,
    first_prompt,
    picture_command,
    register_base,
    signals_interrupt,
    stay,
)
from services.client.watch import watch
from services.errors import ServiceError

JOB_FILE = Path(__file__).resolve().parents[2] / "deploy" / "demo.json"


def run_demo(console: Console, state: Path, *, job_file: Path | None, num_cpus: int, keep: bool) -> None:
    """Start, align, evaluate, draw a picture, show the numbers, stop. Raises ServiceError unless the job succeeds."""
    began = time.monotonic()
    with signals_interrupt(), ExitStack() as stack:
        system = stack.enter_context(LocalSystem(state, fresh=True, num_cpus=num_cpus, say=console.print))
        client = stack.enter_context(system.client())
        seconds = {"start-up": time.monotonic() - began}
        console.print(
            f"the API is at {system.url}, logs are in {system.logs}", soft_wrap=True, highlight=False
        )

        request = prepare(client, job_file or JOB_FILE)
        job = watch(client, client.create_job(request).id, console)
        result = finished(job)
        seconds |= {stage: float(value) for stage, value in job.stage_seconds.items() if value is not None}

        model = job.name or str(job.aligned_model)
        asked = time.monotonic()
        picture = draw(client, model, request, system.state)
        seconds["first generation"] = time.monotonic() - asked
        seconds["total"] = time.monotonic() - began

        grid = keep_grid(result, system.state)
        show(console, job, result, seconds, [grid, picture], system.state)
        write_summary(system.state / "summary.json", job, result, seconds)
        if keep:
            key = f"export DDE_URL={system.url} DDE_API_KEY=$(cat {system.key_file})"
            console.print(f"serving until Ctrl-C\n  {key}", markup=False, highlight=False, soft_wrap=True)
            stay(system)


def prepare(client: Client, job_file: Path) -> AlignmentJobCreate:
    """Register the shipped model and pairs; the job of the file with the dataset and the held-out prompts filled in."""
    register_base(client)
    dataset = client.create_dataset(f"{BASE_MODEL}-pairs", PAIRS_FILE.as_uri())
    return job_body(job_file, {"dataset": dataset.id, "prompts": PROMPTS_FILE.as_uri()})


def finished(job: Job) -> EvaluateResult:
    """The evaluation of a job that succeeded. Raises ServiceError, with the reason, for any other."""
    if job.status != "succeeded" or job.result is None or job.result.evaluate is None:
        raise ServiceError(f"{job.id} {job.status}" + (f": {job.reason}" if job.reason else ""))
    return job.result.evaluate


def draw(client: Client, model: str, request: AlignmentJobCreate, folder: Path) -> Path:
    """One picture from the aligned model, by its name, with the settings of the evaluation."""
    sample = request.evaluation.sample
    wanted = ImageRequest(
        model=model, prompt=first_prompt(), steps=sample.steps, guidance_scale=sample.guidance_scale
    )
    path = folder / "picture.png"
    path.write_bytes(client.generate(wanted)[0])
    return path


def keep_grid(result: EvaluateResult, folder: Path) -> Path:
    """A copy of the picture grid where it is found easily; here storage is a local folder."""
    return Path(shutil.copyfile(url2pathname(urlsplit(result.grid).path), folder / "grid.png"))


def show(
    console: Console,
    job: Job,
    result: EvaluateResult,
    seconds: dict[str, float],
    pictures: list[Path],
    state: Path,
) -> None:
    """The tables, where the pictures are, and how to ask the served model for more."""
    name = job.name or "aligned"
    console.print(tables.comparison(result, BASE_MODEL, name))
    console.print()
    console.print(tables.durations(seconds))
    again = f"{name} is kept; to serve it again: {executables() / 'dde'} up --state {state}"
    lines = [
        *map(str, pictures),
        again,
        "and to draw from it while it is served:",
        f"  {picture_command(name, state)}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def write_summary(path: Path, job: Job, result: EvaluateResult, seconds: dict[str, float]) -> None:
    """The numbers of the tables as JSON, so that two runs can be compared."""
    train = job.result.train if job.result else None
    summary = {
        "model": job.name,
        "num_prompts": result.num_prompts,
        "scores": {name: scores.model_dump() for name, scores in result.scores.items()},
        "training": train.metrics if train else {},
        "seconds": seconds,
    }
    path.write_text(json.dumps(summary, indent=1) + "\n")
