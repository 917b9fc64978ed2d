"""``dde keys``: create, list and revoke API keys."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from services.api.requests import KeyCreate
from services.client import tables
from services.client.connection import connect

keys = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys; needs the scope admin.")


@keys.command("create")
def create_key(
    name: str,
    project: Annotated[
        str | None,
        typer.Option(help="Project of the key; a new name makes a new project. Default: your key's."),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What the key may do: read, submit, generate or admin. Repeatable. Default: all but admin."
        ),
    ] = None,
) -> None:
    """Create an API key; prints it this once: only a hash of it is stored."""
    body: dict[str, Any] = {"name": name, "project": project}
    request = KeyCreate.model_validate(body | ({"scopes": scope} if scope else {}))
    with connect() as client:
        created = client.create_key(request)
    typer.echo(created.key)
    typer.echo(f"{created.id}: project {created.project}, {', '.join(created.scopes)}", err=True)


@keys.command("list")
def list_keys() -> None:
    """List the keys that you manage, by the characters that they end in."""
    with connect() as client:
        rows = [
            (
                key.id,
                key.name,
                key.project,
                ",".join(key.scopes),
                f"...{key.hint}",
                tables.local_time(key.created_at),
                tables.local_time(key.revoked_at) if key.revoked_at else "",
            )
            for key in client.api_keys()
        ]
    columns = ("id", "name", "project", "scopes", "key", "created", "revoked")
    tables.print_list(Console(), columns, rows)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="The key's id, from `dde keys list`.")]) -> None:
    """Refuse a key from now on."""
    with connect() as client:
        client.revoke_key(key_id)
    typer.echo(f"{key_id} is revoked")
