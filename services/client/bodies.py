"""Build a job's body from a recipe, a file and command-line options."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from services.api.requests import CAPTIONS, HELD_OUT, AlignmentJobCreate, StudyCreate
from services.client.recipes import merged
from services.errors import BadRequest

ROLLOUT_PLACEHOLDERS = {"prompts_uri": "PROMPTS", "num_prompts": 1, "scorers": {"SCORER": 1.0}}
"""Values for a dry run of what a job's rollouts leave out."""

OPTION_PATHS = {
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
    "rollout_prompts": ("rollouts", "prompts_uri"),
    "num_rollout_prompts": ("rollouts", "num_prompts"),
    "reward": ("rollouts", "scorers"),
}
"""Where an option belongs in the body. An option that is not listed sets the top-level field of its name."""

PLACEHOLDERS = {"model": "MODEL", "evaluation": {"prompts_uri": "PROMPTS"}}
"""Values for a dry run, which needs no model and no prompts."""


def job_body(
    file: Path | None,
    options: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    is_dry: bool = False,
) -> AlignmentJobCreate:
    """The body of a job. Options that are not None override the file, and the file overrides the recipe.

    ``is_dry`` fills in what rollouts lack to be read.
    """
    body = merged(recipe or {}, read_body(file) if file else {})
    for option, value in options.items():
        if value is not None:
            body = merged(body, _nested(OPTION_PATHS.get(option, (option,)), value))
    for section in (body.get("evaluation"), body.get("validation"), body.get("rollouts")):
        if isinstance(section, dict) and isinstance(section.get("prompts_uri"), str):
            section["prompts_uri"] = as_uri(section["prompts_uri"])
    if is_dry and isinstance(body.get("rollouts"), dict):
        body["rollouts"] = ROLLOUT_PLACEHOLDERS | body["rollouts"]
        if body.get("dataset") == PLACEHOLDERS.get("dataset"):
            body.pop("dataset", None)
    return AlignmentJobCreate.model_validate_json(json.dumps(body))


def study_body(file: Path, options: Mapping[str, str | None]) -> StudyCreate:
    """The body of a study. The options model, dataset and prompts override the file's base; prompts also
    override the evaluation's.

    Raises BadRequest for a file that does not hold a study.
    """
    body = read_body(file)
    for section in ("base", "grid", "evaluation"):
        if not isinstance(body.setdefault(section, {}), dict):
            raise BadRequest(f"{section}: must be an object, got {body[section]!r}", param=section)
    for option in ("model", "dataset"):
        if options.get(option):
            body["base"][option] = options[option]
    if options.get("prompts"):
        body["base"] = merged(body["base"], {"evaluation": {"prompts_uri": options["prompts"]}})
        body["evaluation"]["prompts_uri"] = options["prompts"]
    try:
        text = json.dumps(_with_uris(body), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"{file} has a value that is not JSON: {error}") from error
    return StudyCreate.model_validate_json(text)


def _with_uris(value: Any, field: str = "") -> Any:
    """The value, in which every path of prompts, also in a list or an override, is a URI."""
    if isinstance(value, dict):
        return {key: _with_uris(each, str(key)) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_uris(each, field) for each in value]
    is_path = field.rpartition(".")[2] == "prompts_uri" and isinstance(value, str)
    return as_uri(value) if is_path else value


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """``("training", "steps"), 7`` as ``{"training": {"steps": 7}}``."""
    first, *rest = path
    return {first: _nested(rest, value) if rest else value}


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
    """``["caption=prompt"]`` as a mapping. ``NAME=`` alone means that the column is not read.

    Raises BadRequest for an option without a name.
    """
    columns = {}
    for option in options:
        name, separator, column = option.partition("=")
        if not (name and separator):
            raise BadRequest(f"--column must be NAME=COLUMN, as in caption=prompt, got {option!r}")
        columns[name] = column
    return columns


def weights_of(options: Sequence[str]) -> dict[str, float]:
    """``["pick=1", "taste=0.5"]`` as a mapping; a name alone has the weight 1.

    Raises BadRequest for an option without a name, or whose weight is no number.
    """
    weights = {}
    for option in options:
        name, _, weight = option.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            name = ""
        if not name:
            raise BadRequest(f"--reward must be NAME or NAME=WEIGHT, as in taste=0.5, got {option!r}")
    return weights


def workers_of(option: str) -> int | list[int]:
    """``"2"`` as 2, ``"1-4"`` as [1, 4]. Raises BadRequest for anything else."""
    numbers = option.split("-")
    if len(numbers) > 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise BadRequest(f"--workers must be a number, or LEAST-MOST, as in 1-4, got {option!r}")
    return int(option) if len(numbers) == 1 else [int(number) for number in numbers]


def as_uri(path_or_uri: str) -> str:
    """A URI as it is, a path as file://."""
    if "://" in path_or_uri or path_or_uri.startswith((HELD_OUT, CAPTIONS)):
        return path_or_uri
    return Path(path_or_uri).expanduser().resolve().as_uri()


def validation_line(error: ValidationError) -> str:
    """Every invalid field with its value: ``training.steps: Input should be greater than 0, got -5``."""
    problems = []
    for problem in error.errors():
        field = ".".join(map(str, problem["loc"])) or "body"
        value = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
        problems.append(f"{field}: {problem['msg']}{value}")
    return "; ".join(problems)
