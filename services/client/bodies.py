"""Job bodies from a file and from options."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from services.api.requests import AlignmentJobCreate
from services.client.recipes import merged
from services.errors import BadRequest

PLACES = {
    "method": ("objective", "method"),
    "beta": ("objective", "beta"),
    "steps": ("training", "steps"),
    "batch_size": ("training", "batch_size"),
    "learning_rate": ("training", "learning_rate"),
    "checkpoint_every": ("training", "checkpoint_every"),
    "seed": ("training", "seed"),
    "reference": ("training", "reference"),
    "prompts": ("evaluation", "prompts_uri"),
    "num_prompts": ("evaluation", "num_prompts"),
}
"""Where an option stands in a job's body; those that are not here stand at the top."""

TO_BE_NAMED = {"model": "MODEL", "dataset": "DATASET", "evaluation": {"prompts_uri": "PROMPTS"}}
"""What a dry run does not have to be told."""


def job_body(
    file: Path | None, options: Mapping[str, Any], recipe: Mapping[str, Any] | None = None
) -> AlignmentJobCreate:
    """The body of a job: the recipe's, above it what the file says, and above both every option that is not None."""
    body = merged(recipe or {}, read_body(file) if file else {})
    for option, value in options.items():
        if value is not None:
            for key in reversed(PLACES.get(option, (option,))):
                value = {key: value}
            body = merged(body, value)
    for part in (body.get("evaluation"), body.get("validation")):
        if isinstance(part, dict) and isinstance(part.get("prompts_uri"), str):
            part["prompts_uri"] = as_uri(part["prompts_uri"])
    return AlignmentJobCreate.model_validate_json(json.dumps(body))


def read_body(file: Path) -> dict[str, Any]:
    """The object in a JSON or YAML file. Raises BadRequest, naming the file."""
    text = file.read_text()
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        try:
            body = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadRequest(f"{file} is neither JSON nor YAML: {' '.join(str(error).split())}") from error
    if not isinstance(body, dict):
        raise BadRequest(f"{file} must hold an object, got {type(body).__name__}")
    return body


def columns_of(options: Sequence[str]) -> dict[str, str]:
    """``["caption=prompt"]`` as a mapping. Raises BadRequest for one without a name or a column."""
    pairs = [option.partition("=") for option in options]
    if wrong := [
        option for option, (name, _, column) in zip(options, pairs, strict=True) if not (name and column)
    ]:
        raise BadRequest(f"--column must be NAME=COLUMN, as in caption=prompt, got {wrong[0]!r}")
    return {name: column for name, _, column in pairs}


def workers_of(option: str) -> int | list[int]:
    """``"2"`` or ``"1-4"``. Raises BadRequest for anything else."""
    numbers = option.split("-")
    if len(numbers) > 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise BadRequest(f"--workers must be a number, or LEAST-MOST, as in 1-4, got {option!r}")
    return int(option) if len(numbers) == 1 else [int(number) for number in numbers]


def as_uri(place: str) -> str:
    """A URI as it is, a path as file://."""
    return place if "://" in place else Path(place).expanduser().resolve().as_uri()


def validation_line(error: ValidationError) -> str:
    """Every wrong field with its value: ``training.steps: Input should be greater than 0, got -5``."""
    return "; ".join(
        f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}"
        + ("" if each["type"] == "missing" else f", got {each['input']!r}")
        for each in error.errors()
    )
