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


def violation(spec: TrainSpec, validated: dict[int, Validated]) -> tuple[int, str] | None:
    """The first step where a guarded scorer has fallen too far while the reward rose, and this in words.

    ``validated`` has the base as step 0; without it nothing can be compared. A scorer of the reward that
    validation does not measure counts as risen: training follows it.
    """
    base = validated.get(0)
    if not spec.rollouts or base is None:
        return None
    for step in sorted(validated.keys() - {0}):
        found = validated[step].metrics
        risen = [
            name
            for name in spec.rollouts.scorers
            if name not in found or found[name] > base.metrics.get(name, found[name])
        ]
        for name, limit in spec.rollouts.guard.items():
            fall = base.metrics.get(name, 0.0) - found.get(name, float("inf"))
            if risen and fall > limit:
                message = (
                    f"{name} is {fall:.3g} below the base's, more than rollouts.guard allows ({limit:g})"
                )
                return step, f"{message}, while the reward has risen ({', '.join(risen)})"
    return None


def with_base(run: str) -> dict[int, Validated]:
    """``outcomes``, and that of the base as step 0 if validation has measured it."""
    found = outcomes(run)
    if 0 in validated_steps(run):
        found[0] = Validated.model_validate_json(files.read_bytes(layout.outcome_uri(run, 0)))
    return found


def chosen(spec: TrainSpec, validated: dict[int, Validated]) -> int | None:
    """The step that validation chooses, or None if it does not choose: then the last one becomes the model.

    After a violation of the guard no later step is chosen, and without ``best_metric`` the last one before.
    """
    ended = violation(spec, validated)
    allowed = {step: each for step, each in validated.items() if 0 < step and (not ended or step < ended[0])}
    if spec.validation and spec.validation.best_metric:
        return best_step(allowed, spec.validation.best_metric)
    return max(allowed, default=None) if ended else None


def _last_allowed(spec: TrainSpec, validated: dict[int, Validated]) -> int | None:
    """The last validated step, which a violation of the guard may make the model."""
    if not (spec.rollouts and spec.rollouts.guard):
        return None
    ended = violation(spec, validated)
    return max((step for step in validated if 0 < step and (not ended or step < ended[0])), default=None)


def prunable(spec: TrainSpec) -> list[int]:
    """Steps whose checkpoints can be deleted: all but the last, the best, and those that await validation."""
    steps = checkpoints.steps(spec.run)
    validated = validated_steps(spec.run)
    kept = set(steps[-spec.training.keep_checkpoints :])
    kept |= {step for step in steps if is_due(spec, step) and step not in validated}
    found = with_base(spec.run)
    kept |= {step for step in (chosen(spec, found), _last_allowed(spec, found)) if step is not None}
    return [step for step in steps if step not in kept]
