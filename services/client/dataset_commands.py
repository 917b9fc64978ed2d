"""``dde datasets``: register, check and list datasets, and let scorers make some."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from services.api.answers import DatasetView
from services.api.requests import GeneratePairs, Relabel
from services.client import tables
from services.client.api import Client
from services.client.bodies import as_uri, columns_of
from services.client.connection import connect
from services.errors import BadRequest, ServiceError

datasets = typer.Typer(
    no_args_is_help=True, help="Register, check, list and make datasets of preference pairs."
)

POLL_S = 1.0

PairsUri = Annotated[
    str,
    typer.Argument(help="Parquet, JSON, CSV, tars, or a folder (Hugging Face or win/lose): a path or a URI."),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=COLUMN",
        help="Column of your files to read as NAME: caption=prompt. NAME= alone: not read. Repeatable.",
    ),
]
SplitOption = Annotated[
    str | None, typer.Option(help="Split to read of a folder that holds several, such as train.")
]
Wait = Annotated[bool, typer.Option(help="Wait until the dataset is ready, and print what it contains.")]


@datasets.command("create")
def create_dataset(name: str, uri: PairsUri, column: ColumnOption = None, split: SplitOption = None) -> None:
    """Register preference pairs; prints the dataset's id."""
    with connect() as client:
        dataset = client.create_dataset(name, as_uri(uri), columns_of(column or ()), split)
    typer.echo(dataset.id)
    _describe(dataset)


@datasets.command("validate")
def validate_dataset(uri: PairsUri, column: ColumnOption = None, split: SplitOption = None) -> None:
    """Check a sample of rows and images and print a report. Exit code 1 if no pair is usable."""
    with connect() as client:
        report = client.validate_dataset(as_uri(uri), columns_of(column or ()), split)
    tables.print_report(Console(), report)
    if not report.sampled["decided"]:
        raise typer.Exit(1)


@datasets.command("list")
def list_datasets() -> None:
    """List all datasets."""
    with connect() as client:
        rows = [
            (d.id, d.name, d.counts.pairs if d.counts else d.status, d.uri, tables.local_time(d.created_at))
            for d in client.datasets()
        ]
    tables.print_list(Console(), ("id", "name", "pairs", "uri", "created"), rows)


@datasets.command("generate")
def generate_dataset(
    name: str,
    model: Annotated[str, typer.Option(help="Name or id of the model that draws.")],
    prompts: Annotated[
        str,
        typer.Option(help="File of prompts, none of them held out for evaluation: a path or a URI."),
    ],
    num_prompts: Annotated[int, typer.Option(help="Number of prompts, from the beginning of the file.")],
    scorer: Annotated[
        list[str],
        typer.Option(metavar="NAME[=WEIGHT]", help="Scorer that ranks, and its weight (1). Repeatable."),
    ],
    images_per_prompt: Annotated[int, typer.Option(help="Images of each prompt, 2 to 16.")] = 4,
    keep: Annotated[
        str, typer.Option(help="Pairs of a prompt to keep: best_worst or all_pairs.")
    ] = "best_worst",
    margin: Annotated[
        float, typer.Option(help="Pairs that differ by at most so many spreads are dropped as ties.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Image j of prompt i has the seed SEED + i * images + j.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 5.0,
    wait: Wait = True,
) -> None:
    """Make pairs without people: a model draws images and scorers rank them. Prints the dataset's id."""
    body = {
        "model": model,
        "prompts_uri": as_uri(prompts),
        "num_prompts": num_prompts,
        "images_per_prompt": images_per_prompt,
        "scorers": weights_of(scorer),
        "keep": keep,
        "margin": margin,
        "seed": seed,
        "sample": {"steps": steps, "guidance_scale": guidance_scale},
    }
    wanted = GeneratePairs.model_validate_json(json.dumps(body))
    with connect() as client:
        _announce(client, client.generate_dataset(name, wanted), wait=wait)


@datasets.command("relabel")
def relabel_dataset(
    name: str,
    dataset: Annotated[str, typer.Argument(help="Id of the dataset whose pairs are labeled.")],
    scorer: Annotated[str, typer.Option(help="Scorer whose preference becomes the label.")],
    margin: Annotated[
        float, typer.Option(help="Pairs that differ by at most so many spreads are dropped as ties.")
    ] = 0.0,
    background: Annotated[
        str, typer.Option(help="What transparent pixels show: white, gray or black.")
    ] = "white",
    wait: Wait = True,
) -> None:
    """Label a dataset's pairs by a scorer, as a new dataset. Prints its id, and how often both agree."""
    body = {"dataset": dataset, "scorer": scorer, "margin": margin, "background": background}
    wanted = Relabel.model_validate_json(json.dumps(body))
    with connect() as client:
        _announce(client, client.relabel_dataset(name, wanted), wait=wait)


@datasets.command("cancel")
def cancel_dataset(dataset: str) -> None:
    """Stop making a dataset; prints its status."""
    with connect() as client:
        typer.echo(client.cancel_dataset(dataset).status)


def weights_of(options: Sequence[str]) -> dict[str, float]:
    """``["taste", "fidelity=0.5"]`` as weights. Raises BadRequest for a name that is given twice."""
    weights: dict[str, float] = {}
    for option in options:
        name, separator, weight = option.partition("=")
        if name in weights:
            raise BadRequest(f"--scorer {name} is given twice, got {option!r}", param="scorers")
        try:
            weights[name] = float(weight) if separator else 1.0
        except ValueError as error:
            message = f"--scorer must be NAME or NAME=WEIGHT, as in taste=0.5, got {option!r}"
            raise BadRequest(message, param="scorers") from error
    return weights


def _announce(client: Client, dataset: DatasetView, *, wait: bool) -> None:
    """Print the id of a dataset that is being made; wait for it if asked to, showing its events."""
    typer.echo(dataset.id)
    last_event = None
    while wait:
        dataset = client.dataset(dataset.id)
        for event in client.dataset_events(dataset.id, last_event):
            typer.echo(event.message, err=True)
            last_event = event.id
        if dataset.status != "generating":
            break
        time.sleep(POLL_S)
    if dataset.status == "failed":
        raise ServiceError(f"{dataset.id} failed: {dataset.reason}")
    if dataset.result:
        _describe(dataset)
        typer.echo(tables.made_line(dataset.result), err=True)


def _describe(dataset: DatasetView) -> None:
    """Print counts and a decided row on stderr."""
    if dataset.counts:
        typer.echo(tables.counts_line(dataset.counts), err=True)
    if dataset.split:
        typer.echo(f"split: {dataset.split}", err=True)
    if dataset.example:
        typer.echo(f"for example {tables.example_line(dataset.example)}", err=True)
