"""For schemathesis: real ids and files in most requests, and none that breaks a rule between two fields.

JSON Schema has no such rules, and none on the prompts of a file, whose URI schemathesis reads from answers.
Requests that break one are refused with 400 and the field's name;
tests/services/control/test_bad_input.py has them.

The environment has REAL_IDS (JSON: a real id for each path parameter), REAL_FILES (JSON: a real ``uri`` for
each path whose body has one) and SUCCESSES (a file, to which each operation that succeeds is appended).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import schemathesis
from pydantic import ValidationError

from dde_core.shapes import PROMPTS_FILE
from services.api.requests import DatasetCreate, DatasetSource, ModelCreate

REAL_IDS: dict[str, str] = json.loads(os.environ["REAL_IDS"])
REAL_FILES: dict[str, str] = json.loads(os.environ["REAL_FILES"])
SUCCESSES = Path(os.environ["SUCCESSES"])
BODIES = {"/v1/datasets": DatasetCreate, "/v1/datasets/validate": DatasetSource, "/v1/models": ModelCreate}
_IS_ID = re.compile(r"[a-z]+_[0-9a-f]{24}")


@schemathesis.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: Any) -> Any:
    """Name what exists in three of four requests. Nothing that exists is deleted, and ids that an earlier
    answer has are kept.
    """
    if not path_parameters or context.operation.method.upper() == "DELETE":
        return path_parameters
    return {name: _real_id(name, value) for name, value in path_parameters.items()}


def _real_id(name: str, value: Any) -> Any:
    is_invented = isinstance(value, str) and not _IS_ID.fullmatch(value)
    return REAL_IDS[name] if is_invented and sum(value.encode(errors="replace")) % 4 else value


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Name files that exist in valid bodies."""
    path = context.operation.path
    if path not in REAL_FILES:
        return body
    try:
        BODIES[path].model_validate(body)
    except ValidationError:
        return body
    return {name: value for name, value in body.items() if name == "name"} | {"uri": REAL_FILES[path]}


@schemathesis.hook
def after_call(_context: schemathesis.HookContext, case: schemathesis.Case, response: Any) -> None:
    """Record the operations that succeed."""
    if 200 <= response.status_code < 300:
        with SUCCESSES.open("a") as log:
            log.write(f"{case.operation.label}\n")


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    if not isinstance(case.body, dict):
        return True
    if case.path == "/v1/datasets" and not _has_one_origin(case.body):
        return False
    return _is_consistent(case.body) and PROMPTS_FILE.as_uri() not in str(case.body)


def _has_one_origin(body: dict[str, Any]) -> bool:
    """A dataset is read from a URI or made in one way; only files have columns and splits."""
    given = [name for name in ("uri", "generate", "relabel") if body.get(name) is not None]
    return given == ["uri"] or (len(given) == 1 and not body.get("columns") and not body.get("split"))


def _is_consistent(body: dict[str, Any]) -> bool:
    workers = body.get("workers")
    if isinstance(workers, list) and len(workers) == 2 and _exceeds(workers[0], workers[1]):
        return False
    objective = body.get("objective")
    return not isinstance(objective, dict) or not _exceeds(objective.get("t_min", 1), objective.get("t_max"))


def _exceeds(least: Any, most: Any) -> bool:
    """Whether both are numbers, ``least`` is larger, and ``most`` is not 0, which means no limit."""
    are_numbers = isinstance(least, int | float) and isinstance(most, int | float)
    return are_numbers and bool(most) and least > most
