"""For schemathesis: real ids and files in most requests, and none that breaks a rule between two fields.

JSON Schema has no such rules, and none on the prompts of a file, whose URI schemathesis reads from answers.
Requests that break one are refused with 400 and the field's name;
tests/services/control/test_bad_input.py has them.

The environment has REAL_IDS (JSON: a real id for path parameters), REAL_FILES (JSON: a real ``uri`` for
each path whose body has one) and SUCCESSES (a file, to which each operation that succeeds is appended).
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import schemathesis
from pydantic import ValidationError

from dde_core.shapes import PROMPTS_FILE
from services.api.requests import DatasetCreate, DatasetSource, ModelCreate
from services.control.idempotency import MAX_KEY_LENGTH

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
    if name in REAL_IDS and is_invented and sum(value.encode(errors="replace")) % 4:
        return REAL_IDS[name]
    return value


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Name files that exist in valid bodies, and what is registered by a new name."""
    path = context.operation.path
    if path not in REAL_FILES:
        return body
    try:
        BODIES[path].model_validate(body)
    except ValidationError:
        return body
    return {"uri": REAL_FILES[path]} | ({"name": f"n{uuid.uuid4().hex}"} if "name" in body else {})


@schemathesis.hook
def map_headers(_context: schemathesis.HookContext, headers: Any) -> Any:
    """Send each valid Idempotency-Key once."""
    key = headers.get("Idempotency-Key") if headers else None
    if not (isinstance(key, str) and 1 <= len(key) <= MAX_KEY_LENGTH):
        return headers
    return {**headers, "Idempotency-Key": uuid.uuid4().hex}


@schemathesis.hook
def after_call(_context: schemathesis.HookContext, case: schemathesis.Case, response: Any) -> None:
    """Record the operations that succeed."""
    if 200 <= response.status_code < 300:
        with SUCCESSES.open("a") as log:
            log.write(f"{case.operation.label}\n")


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    if isinstance((case.query or {}).get("metadata"), list):
        return False  # in a URL, [x] is written as {"0": x} is
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
    parts = [part for part in (body, *body.values()) if isinstance(part, dict)]
    if any(part.get("cluster") == "own" for part in parts):
        return False  # this installation starts no clusters
    workers = body.get("workers")
    if isinstance(workers, list) and len(workers) == 2 and _exceeds(workers[0], workers[1]):
        return False
    if any(_has_limits(part.get("compare")) for part in parts):
        return False
    objective = body.get("objective")
    return not isinstance(objective, dict) or not _exceeds(objective.get("t_min", 1), objective.get("t_max"))


def _has_limits(compare: Any) -> bool:
    """Whether an evaluation has limits of scorers, which it must have among its own."""
    fields = ("margins", "dead_zones", "drift_limits")
    return isinstance(compare, dict) and any(compare.get(field) for field in fields)


def _exceeds(least: Any, most: Any) -> bool:
    """Whether both are numbers, ``least`` is larger, and ``most`` is not 0, which means no limit."""
    are_numbers = isinstance(least, int | float) and isinstance(most, int | float)
    return are_numbers and bool(most) and least > most
