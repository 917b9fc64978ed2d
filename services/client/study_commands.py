"""``dde study``: start, watch and cancel grids of alignment jobs, and show what they found."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from services.api.answers import StudyView
from services.api.requests import AlignmentJobCreate
from services.api.study_cells import expand
from services.client import tables
from services.client.api import Client
from services.client.bodies import study_body, validation_line
from services.client.connection import connect
from services.client.watch import event_line
from services.errors import BadRequest, ServiceError

study = typer.Typer(no_args_is_help=True, help="Run grids of alignment jobs and compare all of their models.")
POLL_S = 1.0


@study.command("run")
def run_study(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The study as YAML or JSON.")],
    model: Annotated[str | None, typer.Option(help="Name or id of the base model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of the dataset.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts of the jobs' and the study's evaluations: a path or a URI.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and start nothing.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Watch the study until it ends.")] = False,
) -> None:
    """Start a study; prints its id. It goes on without this command."""
    request = study_body(file, {"model": model, "dataset": dataset, "prompts": prompts})
    if dry_run:
        rows = [
            (cell.label, cell.setting, cell.request.name, json.dumps(cell.overrides))
            for cell in expand(request, _parse)
        ]
        return tables.print_list(Console(), ("cell", "setting", "model", "overrides"), rows)
    with connect() as client:
        started = client.create_study(request)
        typer.echo(started.id)
        if follow:
            _follow(client, started.id)


def _parse(label: str, body: dict[str, Any]) -> AlignmentJobCreate:
    try:
        return AlignmentJobCreate.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise BadRequest(f"cell {label}: {validation_line(error)}") from error


@study.command("list")
def list_studies(
    status: Annotated[str | None, typer.Option(help="Only those of this status.")] = None,
) -> None:
    """List all studies."""
    with connect() as client:
        rows = [
            (each.id, each.name, each.status, tables.cells_line(each), tables.local_time(each.created_at))
            for each in client.studies(status)
        ]
    tables.print_list(Console(), ("id", "name", "status", "cells", "created"), rows)


@study.command("show")
def show_study(study_id: Annotated[str, typer.Argument(help="The study's id.")]) -> None:
    """Print a study's cells, and its contrasts and costs once it has succeeded."""
    with connect() as client:
        _show(Console(), client.study(study_id))


@study.command("cancel")
def cancel_study(study_id: Annotated[str, typer.Argument(help="The study's id.")]) -> None:
    """Cancel a study and all of its jobs; prints its status."""
    with connect() as client:
        typer.echo(client.cancel_study(study_id).status)


@study.command("resume")
def resume_study(study_id: Annotated[str, typer.Argument(help="The study's id.")]) -> None:
    """Repeat the evaluations of a study that failed when its models were compared; prints its status."""
    with connect() as client:
        typer.echo(client.resume_study(study_id).status)


def _follow(client: Client, study_id: str) -> None:
    """Print the study's events until it has ended, then what it found. Raises ServiceError if it failed."""
    console = Console()
    last_event = None
    while True:
        seen = client.study(study_id)  # before its events: the last ones come with the final status
        for event in client.study_events(study_id, last_event):
            console.print(event_line(event), markup=False, highlight=False, soft_wrap=True)
            last_event = event.id
        if seen.finished:
            break
        time.sleep(POLL_S)
    _show(console, seen)
    if seen.status != "succeeded":
        raise ServiceError(tables.outcome_line(seen))


def _show(console: Console, seen: StudyView) -> None:
    console.print(f"{seen.name}: {tables.outcome_line(seen)}", soft_wrap=True, highlight=False, markup=False)
    rows = [(each.label, each.status, each.job or "", each.reason or "") for each in seen.cells]
    tables.print_list(console, ("cell", "status", "job", "reason"), rows)
    if seen.result is not None:
        for table in tables.study_tables(seen.result):
            console.print(table)
        where = f"page {seen.result.page}\nreport {seen.result.report}"
        console.print(where, soft_wrap=True, highlight=False, markup=False)
