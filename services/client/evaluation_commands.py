"""``dde evaluations``: save the report of an evaluation, a job or a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.client.connection import connect
from services.errors import BadRequest

evaluations = typer.Typer(no_args_is_help=True, help="Save reports of evaluations.")
FORMS = (".html", ".json")


@evaluations.command("report")
def save_report(
    run_id: Annotated[str, typer.Argument(help="Id of an evaluation, a job or a study.", metavar="ID")],
    out: Annotated[Path, typer.Option(help="File to write: .html for the page, .json for the data.")],
) -> None:
    """Save a report as a file; prints its path. A file that exists is replaced."""
    if out.suffix not in FORMS:
        raise BadRequest(f"--out must end in {' or '.join(FORMS)}, got {str(out)!r}")
    with connect() as client:
        content = client.report(run_id, "html" if out.suffix == ".html" else "json")
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_bytes(content)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    typer.echo(out)
