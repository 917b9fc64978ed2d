"""Which checkpoint becomes the model, what the guard of a reward forbids, and what is kept for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dde_core.config import ObjectiveConfig, TrainConfig
from services.api.records import ModelRecord, Validated
from services.api.requests import Rollouts, ValidationConfig
from services.stages import layout
from services.stages.specs import TrainSpec
from services.storage import files
from services.training import selection

ROLLOUTS = Rollouts(
    prompts_uri="file:///p", num_prompts=4, scorers={"taste": 1.0, "match": 0.5}, guard={"fidelity": 0.02}
)
BASE = {"taste": 0.5, "match": 0.8, "fidelity": 0.9}


def measured(taste: float, fidelity: float, match: float = 0.8) -> dict[str, float]:
    return {"taste": taste, "match": match, "fidelity": fidelity}


@pytest.fixture
def spec(tmp_path: Path) -> TrainSpec:
    run = (tmp_path / "run").as_uri()
    return TrainSpec(
        job="j",
        attempt=1,
        prefix=f"{run}/a1",
        rollouts=ROLLOUTS,
        model=ModelRecord(id="m", name="base", uri="file:///m", family="sd15", digest="", created_at=0),
        model_id="aligned",
        name="aligned",
        objective=ObjectiveConfig(method="tailorpo", beta=10.0),
        training=TrainConfig(steps=40, checkpoint_every=10, keep_checkpoints=1),
        workers=1,
        validation=ValidationConfig(every=10, num_prompts=4),
        run=run,
        output=f"{run}/model",
    )


def validate(spec: TrainSpec, outcomes: dict[int, dict[str, float]]) -> None:
    for step, metrics in outcomes.items():
        written = Validated(step=step, metrics=metrics, seconds=1.0)
        files.write_json(layout.outcome_uri(spec.run, step), written.model_dump(mode="json"))


def store(spec: TrainSpec, *steps: int) -> None:
    for step in steps:
        files.write_json(layout.checkpoint_record_uri(spec.run, step), {})


CASES: list[tuple[dict[int, dict[str, float]], int | None, int | None]] = [
    ({10: measured(0.6, 0.89), 20: measured(0.7, 0.87)}, 20, 10),
    ({10: measured(0.6, 0.89), 20: measured(0.4, 0.7)}, None, None),
    ({10: measured(0.4, 0.7, match=1.2)}, 10, None),
    ({10: {"fidelity": 0.7}}, 10, None),
    ({10: measured(0.6, 0.89), 20: {}, 30: measured(0.7, 0.8)}, 30, 10),
]
"""Outcomes, the step of the violation, and the step that becomes the model after it."""


@pytest.mark.parametrize(("outcomes", "violated", "chosen"), CASES)
def test_the_guard_ends_training_where_a_guarded_scorer_falls_while_the_reward_rises(
    spec: TrainSpec, outcomes: Any, violated: Any, chosen: Any
):
    store(spec, 10, 20, 30)
    validate(spec, {0: BASE, **outcomes})
    found = selection.violation(spec, selection.outcomes(spec.run))
    assert (found[0] if found else None) == violated
    assert selection.chosen(spec, selection.outcomes(spec.run)) == chosen


def test_a_violation_is_remembered_after_its_checkpoint_is_pruned(spec: TrainSpec):
    validate(spec, {0: BASE, 10: measured(0.6, 0.89), 20: measured(0.7, 0.8), 30: measured(0.6, 0.89)})
    store(spec, 10, 30, 40)
    assert selection.chosen(spec, selection.outcomes(spec.run)) == 10
    assert selection.prunable(spec) == [30]


def test_a_base_without_the_guarded_score_is_told_and_not_taken_for_a_pass(spec: TrainSpec):
    store(spec, 10)
    validate(spec, {10: measured(0.6, 0.1)})
    assert selection.unguarded(spec, selection.outcomes(spec.run)) == []
    validate(spec, {0: {}})
    assert selection.unguarded(spec, selection.outcomes(spec.run)) == ["fidelity"]
    assert selection.violation(spec, selection.outcomes(spec.run)) is None
