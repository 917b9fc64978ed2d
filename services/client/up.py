"""`dde up`: run the whole system on this machine until Ctrl-C."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from dde_core.shapes import MODEL_DIR, PAIRS_FILE, PROMPTS_FILE
from services.client.api import Client
from services.client.local import LocalSystem
from services.client.processes import executables

DEFAULT_PORT = 8080
BASE_MODEL = "shapes"


def run_up(
    console: Console, state: Path, *, port: int, num_cpus: int, use_gpu: bool, allow: Sequence[str] = ()
) -> None:
    """Start, register the base model, print the next commands, and run until Ctrl-C or SIGTERM."""
    ports = (port,) if port else (DEFAULT_PORT, 0)
    with signals_interrupt():
        try:
            with LocalSystem(
                state, allow=allow, ports=ports, num_cpus=num_cpus, use_gpu=use_gpu, report=console.print
            ) as system:
                with system.client() as client:
                    register_base(client)
                console.print(guide(system), markup=False, highlight=False, soft_wrap=True)
                run_until_interrupted(system)
        except KeyboardInterrupt:
            console.print("stopped")


def register_base(client: Client) -> None:
    """Register the shipped model under its name, unless it is registered."""
    if not any(model.name == BASE_MODEL for model in client.models()):
        client.create_model(BASE_MODEL, MODEL_DIR.as_uri())


def run_until_interrupted(system: LocalSystem) -> NoReturn:
    """Block until an interrupt. Raises StartFailed if a part of the system has ended by itself."""
    while True:
        system.check()
        time.sleep(1.0)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP too, so that everything is cleaned up.

    And on SIGINT: a shell starts background processes with SIGINT ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def guide(system: LocalSystem) -> str:
    """Addresses, files and the next commands to type."""
    dde = executables() / "dde"
    return f"""
API       {system.url}   (described in {system.url}/openapi.json)
key       {system.key_file}
logs      {system.logs}
metrics   {system.ray.metrics_url}   (Serve's), {system.url}/metrics

  export DDE_URL={system.url} DDE_API_KEY=$(cat {system.key_file})
  curl $DDE_URL/v1/models -H "Authorization: Bearer $DDE_API_KEY"
  {generate_command(BASE_MODEL, system.state)}
  {dde} datasets create shapes-pairs {PAIRS_FILE}
  {dde} jobs create deploy/demo.json --dataset DATASET_ID --prompts {PROMPTS_FILE} --watch

Ctrl-C stops everything. Datasets, models and jobs stay in {system.state};
the next `dde up` continues running jobs from their stored state."""


def generate_command(model: str, state: Path) -> str:
    """The curl command that generates an image with the system that runs in a state folder."""
    body = json.dumps({"model": model, "prompt": first_prompt()})
    header = f'-H "Authorization: Bearer $(cat {state}/key)" -H "Content-Type: application/json"'
    return f"curl $(cat {state}/url)/v1/images/generations {header} -d '{body}'"


def first_prompt() -> str:
    """The first held-out prompt."""
    with PROMPTS_FILE.open() as prompts:
        return prompts.readline().strip()
