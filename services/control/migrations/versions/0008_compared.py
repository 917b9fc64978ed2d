"""Evaluations compare several models: requests, inputs and results of earlier ones get the new form.

Revision ID: 0008
"""

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

JOBS = sa.table(
    "jobs",
    sa.column("seq", sa.BigInteger()),
    sa.column("kind", sa.String()),
    sa.column("name", sa.String()),
    sa.column("request", sa.JSON()),
    sa.column("inputs", sa.JSON()),
    sa.column("results", sa.JSON()),
)
ANSWERS = sa.table("idempotency_keys", sa.column("key", sa.String()), sa.column("answer", sa.JSON()))
Row = dict[str, Any]


def upgrade() -> None:
    _rewrite(_with_models)


def downgrade() -> None:
    """Raises RuntimeError for evaluations that the version before cannot show."""
    _rewrite(_with_candidate)


def _rewrite(change: Callable[[Row], Row]) -> None:
    """Replace the JSON of evaluations and of what was evaluated. Stored answers of creates are dropped."""
    connection = op.get_bind()
    numbers = connection.scalars(sa.select(JOBS.c.seq).order_by(JOBS.c.seq)).all()
    for number in numbers:
        row = connection.execute(sa.select(JOBS).where(JOBS.c.seq == number)).mappings().one()
        changed = change(dict(row))
        if changed:
            connection.execute(sa.update(JOBS).where(JOBS.c.seq == number).values(changed))
    keys = connection.execute(sa.select(ANSWERS.c.key, ANSWERS.c.answer)).all()
    for key, answer in keys:
        if answer.get("object") == "evaluation":
            connection.execute(sa.delete(ANSWERS).where(ANSWERS.c.key == key))


def _with_models(row: Row) -> Row:
    changed: Row = {}
    if row["kind"] == "evaluation":
        candidate = row["inputs"]["model"]
        base = row["inputs"]["base"]
        changed["inputs"] = {"models": [base, candidate]}
        request = {name: value for name, value in row["request"].items() if name != "model"}
        compared = [{"name": each["name"], "model": each["id"]} for each in (base, candidate)]
        changed["request"] = {**request, "models": compared, "base": base["name"], "images_per_prompt": 1}
        names = (base["name"], candidate["name"])
    else:
        names = (row["inputs"].get("model", {}).get("name", ""), row["name"])
    result = row["results"].get("evaluate")
    if result:
        scores = {scorer: {names[1]: numbers} for scorer, numbers in result["scores"].items()}
        images = {"images_per_prompt": 1, "images_drawn": 2 * result["num_prompts"]}
        result = {**result, "base": names[0], **images, "scores": scores}
        changed["results"] = {**row["results"], "evaluate": result}
    return changed


def _with_candidate(row: Row) -> Row:
    changed: Row = {}
    if row["kind"] == "evaluation":
        compared = row["inputs"]["models"]
        request = dict(row["request"])
        base = [each for each in compared if each["name"] == request["base"]]
        others = [each for each in compared if each["name"] != request["base"]]
        if len(others) > 1 or any("images_uri" in each for each in compared):
            raise RuntimeError("evaluations of several models exist: delete them before the downgrade")
        if request.pop("images_per_prompt") > 1:
            raise RuntimeError(
                "evaluations of several images for a prompt exist: delete them before the downgrade"
            )
        del request["models"]
        changed["inputs"] = {"model": others[0], "base": base[0]}
        changed["request"] = {**request, "model": others[0]["id"], "base": base[0]["id"]}
    result = row["results"].get("evaluate")
    if result:
        added = ("base", "images_per_prompt", "images_drawn")
        result = {name: value for name, value in result.items() if name not in added}
        result["scores"] = {scorer: next(iter(each.values())) for scorer, each in result["scores"].items()}
        changed["results"] = {**row["results"], "evaluate": result}
    return changed
