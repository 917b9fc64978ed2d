"""What a migration does to those who still run the version before: it may only expand the schema.

The version before names its own columns in every statement. It goes on working if each of them is still there
with its type, if what it writes is still accepted, and if what it reads is still what it wrote.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, inspect

Schema = dict[str, dict[str, Any]]


def read(engine: Engine) -> Schema:
    """Columns, keys and constraints of each table."""
    found = inspect(engine)
    return {
        table: {
            "columns": {column["name"]: column for column in found.get_columns(table)},
            "key": tuple(found.get_pk_constraint(table)["constrained_columns"]),
            "unique": _unique(found, table),
            "references": {
                (*each["constrained_columns"], each["referred_table"])
                for each in found.get_foreign_keys(table)
            },
        }
        for table in found.get_table_names()
        if table != "alembic_version"
    }


def _unique(found: Any, table: str) -> set[tuple[str, ...]]:
    """The columns of each constraint or index that forbids to repeat them."""
    constraints = found.get_unique_constraints(table)
    indexes = [index for index in found.get_indexes(table) if index["unique"]]
    return {tuple(each["column_names"]) for each in [*constraints, *indexes]}


def contractions(before: Schema, after: Schema) -> list[str]:
    """Each change from ``before`` to ``after`` that may break the version before; none if it expands."""
    problems = []
    for table, old in before.items():
        if table not in after:
            problems.append(f"{table} is gone")
            continue
        new = after[table]
        for name, column in old["columns"].items():
            problems += _column(f"{table}.{name}", column, new["columns"].get(name))
        for name in new["columns"].keys() - old["columns"].keys():
            added = new["columns"][name]
            if not added["nullable"] and added["default"] is None:
                problems.append(f"{table}.{name} is new, not null and has no server default")
        if new["key"] != old["key"]:
            problems.append(f"{table} has another primary key: {new['key']}")
        problems += [f"{table} has a new unique constraint: {each}" for each in new["unique"] - old["unique"]]
        problems += [f"{table} has a new reference: {each}" for each in new["references"] - old["references"]]
    return sorted(problems)


def _column(name: str, old: dict[str, Any], new: dict[str, Any] | None) -> list[str]:
    if new is None:
        return [f"{name} is gone"]
    problems = []
    if str(new["type"]) != str(old["type"]):
        problems.append(f"{name} has another type: {new['type']}")
    if new["nullable"] and not old["nullable"]:
        problems.append(f"{name} may be null now")
    if old["nullable"] and not new["nullable"]:
        problems.append(f"{name} may not be null any more")
    if old["default"] is not None and new["default"] is None:
        problems.append(f"{name} has no server default any more")
    return problems
