"""Which checkpoints are looked at, which one becomes the model, and which are no longer needed."""

from __future__ import annotations

from services.api.records import Validated
from services.api.requests import Metric
from services.artifacts import checkpoints
from services.stages.specs import TrainSpec
from services.storage import files


def outcomes(run: str) -> dict[int, Validated]:
    """What validation has said of the checkpoints that are there, by step."""
    steps = looked_at(run) & set(checkpoints.steps(run))
    return {
        step: Validated.model_validate_json(files.read_bytes(checkpoints.outcome_uri(run, step)))
        for step in steps
    }


def looked_at(run: str) -> set[int]:
    """Steps of which validation has said what it can."""
    names = files.list_files(files.join(run, checkpoints.VALIDATION))
    return {int(name[5:-5]) for name in names if name.endswith(".json")}


def is_due(spec: TrainSpec, step: int) -> bool:
    """Whether validation looks at the model after ``step`` steps: every so often, and at the end where pairs are held out."""
    if spec.validation and step % spec.validation.every == 0:
        return True
    return step == spec.training.steps and (spec.validation is not None or spec.training.held_out_pairs > 0)


def best(found: dict[int, Validated], metric: Metric) -> int | None:
    """The step after which the metric was largest, the first of several; None where it was never measured."""
    values = {
        step: each.metrics[metric] for step, each in found.items() if step > 0 and metric in each.metrics
    }
    return max(values, key=lambda step: (values[step], -step)) if values else None


def superfluous(spec: TrainSpec) -> list[int]:
    """Steps whose checkpoints may go: not the last ones, nor the best, nor those that validation has yet to look at."""
    steps, seen = checkpoints.steps(spec.run), looked_at(spec.run)
    kept = set(steps[-spec.training.keep_checkpoints :]) | {
        step for step in steps if is_due(spec, step) and step not in seen
    }
    if spec.validation and spec.validation.best_metric:
        kept |= {best(outcomes(spec.run), spec.validation.best_metric) or 0}
    return [step for step in steps if step not in kept]
