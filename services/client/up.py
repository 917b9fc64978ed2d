"""`dde up`: the whole system on this machine until it is told to stop."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from dde_core.shapes import MODEL_DIR, PAIRS_FILE, PROMPTS_FILE
from services.client.api import Client
from services.client.local import LocalSystem
from services.client.processes import executables

USUAL_PORT = 8080
BASE_MODEL = "shapes"


def run_up(console: Console, state: Path, *, port: int, num_cpus: int, use_gpu: bool) -> None:
    """Start, register the base model, say how to use it, and stay until Ctrl-C or SIGTERM."""
    ports = (port,) if port else (USUAL_PORT, 0)
    with signals_interrupt():
        try:
            with LocalSystem(
                state, ports=ports, num_cpus=num_cpus, use_gpu=use_gpu, say=console.print
            ) as system:
                with system.client() as client:
                    register_base(client)
                console.print(guide(system), markup=False, highlight=False, soft_wrap=True)
                stay(system)
        except KeyboardInterrupt:
            console.print("stopped")


def register_base(client: Client) -> None:
    """Make the shipped model known under its name, once."""
    if not any(model.name == BASE_MODEL for model in client.models()):
        client.create_model(BASE_MODEL, MODEL_DIR.as_uri())


def stay(system: LocalSystem) -> None:
    """Return never. Raises StartFailed where a part has ended by itself."""
    while True:
        system.check()
        time.sleep(1.0)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP do what Ctrl-C does, so that everything is cleaned up.

    SIGINT itself too: a shell starts what it puts into the background with that one ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def guide(system: LocalSystem) -> str:
    """What to type next."""
    dde = executables() / "dde"
    return f"""
API       {system.url}   (described in {system.url}/openapi.json)
key       {system.key_file}
logs      {system.logs}

  export DDE_URL={system.url} DDE_API_KEY=$(cat {system.key_file})
  curl $DDE_URL/v1/models -H "Authorization: Bearer $DDE_API_KEY"
  {picture_command(BASE_MODEL, system.state)}
  {dde} datasets create shapes-pairs {PAIRS_FILE}
  {dde} jobs create deploy/demo.json --dataset DATASET_ID --prompts {PROMPTS_FILE} --watch

Ctrl-C stops everything. What is registered stays in {system.state}; a job that runs then
goes on with the next `dde up`, from what is stored."""


def picture_command(model: str, state: Path) -> str:
    """The curl line that draws a picture from the system that runs in a state folder."""
    body = json.dumps({"model": model, "prompt": first_prompt()})
    header = f'-H "Authorization: Bearer $(cat {state}/key)" -H "Content-Type: application/json"'
    return f"curl $(cat {state}/url)/v1/images/generations {header} -d '{body}'"


def first_prompt() -> str:
    """The first of the held-out prompts."""
    with PROMPTS_FILE.open() as prompts:
        return prompts.readline().strip()
