"""For schemathesis: leaves out requests that break a rule between two fields. JSON Schema has no such rules.

Such requests are refused with 400 and the field's name; tests/services/control/test_bad_input.py has them.
"""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    if not isinstance(case.body, dict):
        return True
    if case.path == "/v1/datasets" and not _has_one_origin(case.body):
        return False
    return _is_consistent(case.body)


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
