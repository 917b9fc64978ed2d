"""Which checkpoints are validated, which one becomes the model, and which can be pruned."""

from __future__ import annotations

from collections.abc import Mapping

from services.api.records import Validated
from services.api.requests import Rollouts
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
    """What validation measured, by step: of the base as step 0, and of checkpoints, pruned ones too."""
    return {
        step: Validated.model_validate_json(files.read_bytes(layout.outcome_uri(run, step)))
        for step in validated_steps(run)
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

    ``validated`` are all outcomes. What was not measured of the base or of a step is not compared
    (``unguarded``). A reward of which a scorer was not measured counts as risen: training follows it.
    """
    if not spec.rollouts or 0 not in validated:
        return None
    base = validated[0].metrics
    for step in sorted(validated.keys() - {0}):
        found = validated[step].metrics
        before, now = (_reward(spec.rollouts, metrics) for metrics in (base, found))
        if before is not None and now is not None and now <= before:
            continue
        for name, limit in spec.rollouts.guard.items():
            if name in base and name in found and base[name] - found[name] > limit:
                fall = f"{name} is {base[name] - found[name]:.3g} below the base's"
                risen = "" if before is None or now is None else f" from {before:.4g} to {now:.4g}"
                return step, (
                    f"{fall}, more than rollouts.guard allows ({limit:g}), while the reward has risen{risen}"
                )
    return None


def unguarded(spec: TrainSpec, validated: dict[int, Validated]) -> list[str]:
    """Guarded scorers that validation has not measured of the base, though it has ended: no guard holds."""
    if not spec.rollouts or 0 not in validated:
        return []
    return [name for name in spec.rollouts.guard if name not in validated[0].metrics]


def _reward(rollouts: Rollouts, metrics: Mapping[str, float]) -> float | None:
    """The weighted sum of mean scores, or None if one of them was not measured."""
    if not rollouts.scorers.keys() <= metrics.keys():
        return None
    return sum(weight * metrics[name] for name, weight in rollouts.scorers.items())


def chosen(spec: TrainSpec, validated: dict[int, Validated]) -> int | None:
    """The step that validation chooses, or None if it does not choose: then the last one becomes the model.

    ``validated`` are all outcomes. After a violation of the guard no later step is chosen, and without
    ``best_metric`` the last one before.
    """
    allowed = _allowed(spec, validated)
    if spec.validation and spec.validation.best_metric:
        return best_step(allowed, spec.validation.best_metric)
    return max(allowed, default=None) if violation(spec, validated) else None


def _allowed(spec: TrainSpec, validated: dict[int, Validated]) -> dict[int, Validated]:
    """Outcomes of checkpoints that exist, from before a violation, with every guarded scorer measured."""
    ended = violation(spec, validated)
    guarded = spec.rollouts.guard.keys() if spec.rollouts else set()
    return {
        step: validated[step]
        for step in sorted(validated.keys() & set(checkpoints.steps(spec.run)) - {0})
        if (not ended or step < ended[0]) and guarded <= validated[step].metrics.keys()
    }


def _last_allowed(spec: TrainSpec, validated: dict[int, Validated]) -> int | None:
    """The last validated step, which a violation of the guard may make the model."""
    if not (spec.rollouts and spec.rollouts.guard):
        return None
    return max(_allowed(spec, validated), default=None)


def prunable(spec: TrainSpec) -> list[int]:
    """Steps whose checkpoints can be deleted: all but the last, the best, and those that await validation."""
    steps = checkpoints.steps(spec.run)
    validated = validated_steps(spec.run)
    kept = set(steps[-spec.training.keep_checkpoints :])
    kept |= {step for step in steps if is_due(spec, step) and step not in validated}
    found = outcomes(spec.run)
    kept |= {step for step in (chosen(spec, found), _last_allowed(spec, found)) if step is not None}
    return [step for step in steps if step not in kept]
