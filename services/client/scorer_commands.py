"""``dde scorers``: register, list and delete scorers of images."""

from __future__ import annotations

from typing import Annotated, get_args

import typer
from rich.console import Console

from services.api.requests import ScorerCreate, ScorerKind
from services.client import tables
from services.client.bodies import as_uri
from services.client.connection import connect

scorers = typer.Typer(no_args_is_help=True, help="Register, list and delete scorers of images.")


@scorers.command("create")
def create_scorer(
    name: str,
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(get_args(ScorerKind))}.")],
    uri: Annotated[str, typer.Argument(help="The checkpoint: a folder or a file, as a path or a URI.")],
    processor: Annotated[
        str | None,
        typer.Option(help="Tokenizer and image settings, where they are not beside the checkpoint."),
    ] = None,
    resize: Annotated[
        str, typer.Option(help="How hps makes an image smaller: antialiased or aliased.")
    ] = "antialiased",
) -> None:
    """Register a scorer; prints its id."""
    body = {
        "name": name,
        "kind": kind,
        "uri": as_uri(uri),
        "processor": as_uri(processor) if processor else None,
        "resize": resize,
    }
    request = ScorerCreate.model_validate(body)
    with connect() as client:
        created = client.create_scorer(request)
    typer.echo(created.id)
    typer.echo(f"{created.name}: {created.kind}, {created.scale}; digest {created.digest}", err=True)


@scorers.command("list")
def list_scorers() -> None:
    """List all scorers; the built-in ones are of the shapes world."""
    with connect() as client:
        rows = [
            (
                scorer.id,
                scorer.name,
                scorer.kind,
                scorer.level,
                scorer.scale,
                scorer.digest[:12],
                scorer.uri or "built in",
            )
            for scorer in client.scorers()
        ]
    tables.print_list(Console(), ("id", "name", "kind", "of each", "scale", "digest", "uri"), rows)


@scorers.command("delete")
def delete_scorer(name: Annotated[str, typer.Argument(help="Name or id of the scorer.")]) -> None:
    """Forget a scorer that no unfinished job or evaluation uses; its files stay."""
    with connect() as client:
        client.delete_scorer(name)
    typer.echo(f"{name} is deleted")
