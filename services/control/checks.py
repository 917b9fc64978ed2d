"""What can be known of a request before anything is spent: does it fit the base, the dataset, its prompts?

Every function raises BadRequest, naming the field and its value.
"""

from __future__ import annotations

from dde_core.errors import DataError
from dde_core.shapes import scorers
from services.api.records import ModelRecord
from services.api.requests import AlignmentJobCreate, EvaluationConfig, ValidationConfig, most_workers
from services.artifacts import models
from services.artifacts.prompts import prompt_lines
from services.control.problems import show
from services.control.tables import Dataset
from services.errors import BadRequest
from services.pairs.validation import check_bad


def check_alignment(asked: AlignmentJobCreate) -> None:
    """What the request says by itself, and whether its prompts are there."""
    if most_workers(asked.workers) > asked.training.batch_size:
        raise BadRequest(
            f"workers: must be at most training.batch_size, got {show(asked.workers)}", param="workers"
        )
    _check_parallelism(asked)
    check_evaluation(asked.evaluation, "evaluation.")
    if asked.validation is not None:
        _check_validation(asked, asked.validation)


def _check_parallelism(asked: AlignmentJobCreate) -> None:
    """Refuse 8-bit moments on shares; what "auto" comes to is known on the GPUs alone."""
    training, most = asked.training, most_workers(asked.workers)
    if training.parallelism == "fsdp" and training.optimizer == "adamw_8bit" and most > 1:
        refused = f'training.parallelism "fsdp" where workers may be {most}'
        message = f"training.optimizer: does not go with {refused}, got {show(training.optimizer)}"
        raise BadRequest(message, param="training.optimizer")


def check_base(base: ModelRecord, asked: AlignmentJobCreate) -> None:
    """Refuse timesteps that the base's schedule does not have, and adapters for layers that its U-Net does
    not have.
    """
    last, objective = models.num_train_timesteps(base), asked.objective
    for field in ("t_min", "t_max", "calibration_bins"):
        if getattr(objective, field) > last:
            message = f"objective.{field}: must be at most the {last} timesteps of {base.name}, got {getattr(objective, field)}"
            raise BadRequest(message, param=f"objective.{field}")
    if asked.training.lora:
        if base.adapter_of:
            message = (
                f"training.lora: must be null, {base.name} is LoRA adapters on {base.adapter_of.name} itself"
            )
            raise BadRequest(message, param="training.lora")
        if idle := asked.training.lora.unmatched(models.unet_layers(base.uri)):
            message = f"training.lora.targets: matches no linear or convolution layer of {base.name}'s U-Net, got {idle[0]!r}"
            raise BadRequest(message, param="training.lora.targets")


def check_dataset(dataset: Dataset, asked: AlignmentJobCreate) -> None:
    """Refuse a dataset with too few pairs, or with too many bad rows."""
    size, held_out, pairs = asked.training.batch_size, asked.training.held_out_pairs, dataset.counts["pairs"]
    if size <= pairs < size + held_out:
        message = f"training.held_out_pairs: must leave training.batch_size = {size} of the {pairs} pairs, got {held_out}"
        raise BadRequest(message, param="training.held_out_pairs")
    if size > pairs:
        message = (
            f"training.batch_size: must be at most the {pairs} pairs of dataset {dataset.id}, got {size}"
        )
        raise BadRequest(message, param="training.batch_size")
    bad = dataset.counts.get("bad", {})  # what rows say; pictures are looked at when they are encoded
    check_bad(sum(bad.values()), dataset.counts["rows"], bad, asked.data.max_bad_fraction)


def check_evaluation(config: EvaluationConfig, at: str = "") -> None:
    """Refuse prompts that are not there, before a model is trained for them.

    ``at`` is where the config stands in the body.
    """
    param, needed = f"{at}prompts_uri", config.num_prompts
    if len(set(config.scorers)) < len(config.scorers):
        raise BadRequest(f"{at}scorers: must not repeat, got {config.scorers}", param=f"{at}scorers")
    prompts = _prompts(config.prompts_uri, param)
    if len(prompts) < needed:
        message = (
            f"{param}: {config.prompts_uri!r} holds {len(prompts)} prompts, {at}num_prompts asks for {needed}"
        )
        raise BadRequest(message, param=param, code="too_few_prompts")
    _check_scored(prompts[:needed], config, f"{at}scorers")


def _check_validation(asked: AlignmentJobCreate, config: ValidationConfig) -> None:
    """Refuse a validation that no checkpoint meets, that has nothing to measure, or no prompts."""
    interval, held_out, steps = (
        asked.training.checkpoint_every,
        asked.training.held_out_pairs,
        asked.training.steps,
    )
    if config.every % interval:
        message = f"validation.every: must be a multiple of training.checkpoint_every = {interval}, got {config.every}"
        raise BadRequest(message, param="validation.every")
    if config.every > steps:
        message = f"validation.every: must be at most training.steps = {steps}, got {config.every}"
        raise BadRequest(message, param="validation.every")
    if not config.num_prompts and not held_out:
        message = "validation.num_prompts: must be above 0 where training.held_out_pairs is 0: nothing is measured, got 0"
        raise BadRequest(message, param="validation.num_prompts")
    if wrong := _unmeasured(asked, config):
        message = f"validation.best_metric: {wrong}, got {show(config.best_metric)}"
        raise BadRequest(message, param="validation.best_metric")
    if config.num_prompts:
        _check_validation_prompts(asked.evaluation, config)


def _unmeasured(asked: AlignmentJobCreate, config: ValidationConfig) -> str | None:
    """Why the named metric will not be there."""
    if config.best_metric is None:
        return None
    if config.best_metric.startswith("held_out_"):
        return None if asked.training.held_out_pairs else "needs training.held_out_pairs greater than 0"
    if config.best_metric not in asked.evaluation.scorers:
        return "must be one of evaluation.scorers, or of the held-out pairs"
    return None if config.num_prompts else "needs validation.num_prompts greater than 0"


def _check_validation_prompts(evaluation: EvaluationConfig, config: ValidationConfig) -> None:
    """Its own file's first prompts, else those after the evaluation's."""
    needed, skipped = config.num_prompts, 0 if config.prompts_uri else evaluation.num_prompts
    param = "validation.prompts_uri" if config.prompts_uri else "validation.num_prompts"
    uri = config.prompts_uri or evaluation.prompts_uri
    prompts = _prompts(uri, param)
    if len(prompts) < skipped + needed:
        asks = f"evaluation.num_prompts takes {skipped} and " if skipped else ""
        message = (
            f"{param}: {uri!r} holds {len(prompts)} prompts, {asks}validation.num_prompts asks for {needed}"
        )
        raise BadRequest(message, param=param, code="too_few_prompts")
    _check_scored(prompts[skipped : skipped + needed], evaluation, param)


def _prompts(uri: str, param: str) -> list[str]:
    """Every line of a file that is not blank."""
    try:
        return prompt_lines(uri)
    except (OSError, ValueError) as error:  # a BadRequest for the URI's scheme is a ValueError too
        raise BadRequest(f"{param}: cannot be read, got {uri!r}: {error}", param=param) from error


def _check_scored(prompts: list[str], config: EvaluationConfig, param: str) -> None:
    """Refuse prompts and pictures that the scorers do not know."""
    if not config.scorers:
        return
    try:
        scorers.check(prompts, config.sample.height, config.sample.width)
    except DataError as error:
        raise BadRequest(f"{param}: {error}", param=param) from error
