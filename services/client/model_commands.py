"""``dde models``: register base models, list all models, let an alias refer to one."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from services.client import tables
from services.client.bodies import as_uri
from services.client.connection import connect

models = typer.Typer(no_args_is_help=True, help="Register base models; list base and aligned models.")


@models.command("create")
def create_model(
    name: str,
    uri: Annotated[str, typer.Argument(help="A diffusers folder: a path or a URI.")],
    family: Annotated[
        str | None, typer.Option(help="Expected family: sd15 or sdxl. Default: detected from the files.")
    ] = None,
) -> None:
    """Register a base model; prints its id."""
    with connect() as client:
        model = client.create_model(name, as_uri(uri), family)
    typer.echo(model.version)
    for part, which in model.lineage.get("weights", {}).items():
        typer.echo(f"{part}: {which}", err=True)


@models.command("list")
def list_models() -> None:
    """List all models."""
    with connect() as client:
        rows = [
            (
                m.version,
                m.name,
                ", ".join(m.aliases),
                m.family,
                m.base or "",
                m.job or "",
                tables.local_time(m.created_at),
            )
            for m in client.models()
        ]
    tables.print_list(Console(), ("id", "name", "aliases", "family", "base", "job", "created"), rows)


@models.command("promote")
def promote_model(
    model: Annotated[str, typer.Argument(help="A version: its id, or a name that refers to it.")],
    alias: Annotated[str, typer.Option(help="The alias that refers to it from now on.")] = "production",
) -> None:
    """Let NAME@production refer to a version of a model; promote an earlier one to roll back."""
    with connect() as client:
        promoted = client.promote(model, alias)
    typer.echo(f"{promoted.name}@{alias}: {promoted.version}")
