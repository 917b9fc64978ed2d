"""Which checkpoints are validated, which one becomes the model, and which can be pruned."""

from __future__ import annotations

from services.api.records import Validated
from services.artifacts import checkpoints
from services.stages import layout
from services.stages.specs import TrainSpec
from services.storage import files


def is_due(spec: TrainSpec, step: int) -> bool:
    """Whether the model after ``step`` steps is to be validated. The last one is, if pairs are held out."""
    if spec.validation and step % spec.validation.every == 0:
        return True
    is_last = step == spec.training.steps
    return is_last and (spec.validation is not None or spec.training.held_out_pairs > 0)


def validated_steps(run: str) -> set[int]:
    """Steps whose validation has finished or was given up."""
    steps = (layout.outcome_step(name) for name in files.list_files(layout.validation_folder(run)))
    return {step for step in steps if step is not None}


def outcomes(run: str) -> dict[int, Validated]:
    """What validation measured, by step, for the checkpoints that still exist."""
    steps = validated_steps(run) & set(checkpoints.steps(run))
    return {
        step: Validated.model_validate_json(files.read_bytes(layout.outcome_uri(run, step))) for step in steps
    }


def best_step(validated: dict[int, Validated], metric: str) -> int | None:
    """The step with the largest metric, the first of several; None if the metric was never measured.
    Ignores the base, step 0."""
    values = {
        step: outcome.metrics[metric]
        for step, outcome in validated.items()
        if step > 0 and metric in outcome.metrics
    }
    return max(values, key=lambda step: (values[step], -step)) if values else None


def prunable(spec: TrainSpec) -> list[int]:
    """Steps whose checkpoints can be deleted: all but the last, the best, and those that await validation."""
    steps = checkpoints.steps(spec.run)
    validated = validated_steps(spec.run)
    kept = set(steps[-spec.training.keep_checkpoints :])
    kept |= {step for step in steps if is_due(spec, step) and step not in validated}
    if spec.validation and spec.validation.best_metric:
        best = best_step(outcomes(spec.run), spec.validation.best_metric)
        kept |= {best} if best is not None else set()
    return [step for step in steps if step not in kept]
