"""Checks of a request before any compute is spent: against itself, its base model, its dataset and its
prompts.

Every function raises BadRequest, naming the field and its value. Those of prompts return warnings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from dde_core.errors import ConfigError, DataError, ModelError
from dde_core.models.scheduler_config import check_error, check_terminal_weight, ends_without_signal
from dde_core.parallelism import UNSHARDED_OPTIMIZERS
from dde_core.score_table import Prompt
from dde_core.scorers.kinds import KINDS, Kind
from dde_core.shapes import scorers
from services.api.records import ModelRecord, ScorerRecord
from services.api.requests import (
    HELD_OUT_METRICS,
    AlignmentJobCreate,
    EvaluationConfig,
    ImageFolder,
    PromoteIf,
    ValidationConfig,
    most_workers,
)
from services.artifacts import models
from services.artifacts.external_images import check_images, find_images, one_size
from services.artifacts.prompts import all_prompts
from services.control.problems import show
from services.control.tables import Dataset
from services.errors import BadRequest, NotFound, ServiceError
from services.pairs.pair_counts import CLIP_TOKENS, is_beyond_clip
from services.pairs.validation import check_bad
from services.storage import sources

MAX_HEADERS = 1000
"""Of the images of one folder that a request opens."""


def check_alignment(request: AlignmentJobCreate, used: list[ScorerRecord]) -> list[str]:
    """Check that the request's prompts exist, and the request against itself; return warnings.

    ``used`` are the records of the evaluation's scorers.
    """
    prompts = check_evaluation(request.evaluation, used, "evaluation.")
    warnings = long_prompts(prompts, "evaluation.prompts_uri")
    if most_workers(request.workers) > request.training.batch_size:
        refuse("workers", "must be at most training.batch_size", request.workers)
    _check_parallelism(request)
    if request.validation is not None:
        warnings += _check_validation(request, request.validation, used)
    if request.promote_if is not None:
        _check_gate(request.promote_if, request.evaluation, used)
    return warnings


def _check_parallelism(request: AlignmentJobCreate) -> None:
    """Refuse an optimizer that cannot be sharded. What "auto" chooses is known on the GPUs only."""
    training = request.training
    most = most_workers(request.workers)
    if training.parallelism == "fsdp" and training.optimizer in UNSHARDED_OPTIMIZERS and most > 1:
        why = f'cannot be combined with training.parallelism "fsdp" on up to {most} workers'
        refuse("training.optimizer", why, training.optimizer)


def _check_gate(gate: PromoteIf, evaluation: EvaluationConfig, used: list[ScorerRecord]) -> None:
    """Refuse a gate on a scorer that the evaluation does not have, twice on one, or on drift without a
    limit.
    """
    for field, name in [("scorer", gate.scorer), *(("not_worse", name) for name in gate.not_worse)]:
        if name not in evaluation.scorers:
            refuse(f"promote_if.{field}", f"must be among evaluation.scorers {evaluation.scorers}", name)
    if len(set(gate.not_worse)) < len(gate.not_worse):
        refuse("promote_if.not_worse", "must not repeat", gate.not_worse)
    kinds = {record.name: KINDS[record.kind] for record in used}
    if kinds[gate.scorer].level == "model":
        refuse("promote_if.scorer", "must give numbers of its own to images or prompts", gate.scorer)
    for name in gate.not_worse:
        if kinds[name].level == "model" and name not in evaluation.compare.drift_limits:
            refuse("promote_if.not_worse", "needs a limit in evaluation.compare.drift_limits", name)


def check_base(base: ModelRecord, request: AlignmentJobCreate) -> None:
    """Refuse a base whose files are gone, timesteps beyond its schedule or of infinite weight, and LoRA
    targets that its U-Net does not have."""
    check_folders(base, "model")
    try:
        _check_base_files(base, request)
    except ModelError as error:
        raise BadRequest(f"model: {base.name} cannot be aligned: {error}", param="model") from error


def _check_base_files(base: ModelRecord, request: AlignmentJobCreate) -> None:
    """Raises BadRequest for the request, ModelError for files that have changed since registration."""
    scheduler = models.scheduler_config((base.adapter_of or base).uri)
    num_timesteps = int(scheduler["num_train_timesteps"])
    for field in ("t_min", "t_max", "calibration_bins"):
        value = getattr(request.objective, field)
        if value > num_timesteps:
            why = f"must be at most the {num_timesteps} timesteps of {base.name}"
            refuse(f"objective.{field}", why, value)
    try:
        if request.rollouts is not None:
            request.objective.ranked_starts(num_timesteps)
        check_error(request.objective, scheduler.get("prediction_type", "epsilon"))
        if ends_without_signal(scheduler):
            check_terminal_weight(request.objective, num_timesteps)
    except ConfigError as error:
        refuse(f"objective.{error.field}", error.reason, error.value)
    lora = request.training.lora
    if lora is None:
        return
    if base.adapter_of:
        message = (
            f"training.lora: must be null, {base.name} is LoRA adapters on {base.adapter_of.name} itself"
        )
        raise BadRequest(message, param="training.lora")
    unmatched = lora.unmatched(models.unet_layers(base.uri))
    if unmatched:
        why = f"matches no linear or convolution layer of {base.name}'s U-Net"
        refuse("training.lora.targets", why, unmatched[0])


def check_folders(model: ModelRecord, param: str) -> None:
    """Refuse a registered model whose files have changed so that they may not be opened any more."""
    for each in (model, model.adapter_of):
        if each is None or each.job is not None:
            continue
        try:
            sources.check_folder(each.uri)
        except ServiceError as error:
            message = f"{param}: {each.name} cannot be read: {error}"
            raise type(error)(message, param=param, code=error.code) from error


def check_dataset(dataset: Dataset, request: AlignmentJobCreate) -> None:
    """Refuse a dataset with too few pairs, or with too many bad rows."""
    batch_size = request.training.batch_size
    held_out = request.training.held_out_pairs
    counts = dataset.counts or {}
    pairs = counts["pairs"]
    if pairs < batch_size:
        why = f"must be at most the {pairs} pairs of dataset {dataset.id}"
        refuse("training.batch_size", why, batch_size)
    if pairs < batch_size + held_out:
        why = f"must leave training.batch_size = {batch_size} of the {pairs} pairs"
        refuse("training.held_out_pairs", why, held_out)
    bad = counts.get("bad", {})  # without bad images: those are found when they are encoded
    check_bad(sum(bad.values()), counts["rows"], bad, request.data.max_bad_fraction)


def check_evaluation(config: EvaluationConfig, used: list[ScorerRecord], path: str = "") -> list[Prompt]:
    """Refuse unreadable or too few prompts, and prompts that the scorers cannot score. Returns the prompts.

    ``used`` are the records of the config's scorers, ``path`` its place in the request, such as
    "evaluation.".
    """
    if config.images_per_prompt == 1:
        for i, record in enumerate(used):
            if KINDS[record.kind].level == "prompt":
                why = f"is of kind {record.kind}: {path}images_per_prompt must be at least 2"
                refuse(f"{path}scorers.{i}", why, record.name)
    _check_compare(config, used, path)
    param = f"{path}prompts_uri"
    prompts = prompts_of(config.prompts_uri, param)
    if len(prompts) < config.num_prompts:
        has = f"{config.prompts_uri!r} has {len(prompts)} prompts"
        message = f"{param}: {has}, {path}num_prompts requires {config.num_prompts}"
        raise BadRequest(message, param=param, code="too_few_prompts")
    prompts = prompts[: config.num_prompts]
    _check_scorable(prompts, config, used, f"{path}scorers")
    return prompts


def _check_compare(config: EvaluationConfig, used: list[ScorerRecord], path: str) -> None:
    """Refuse a limit for a scorer that the evaluation does not have, or whose numbers have no such limit."""
    of_models = {record.name for record in used if KINDS[record.kind].level == "model"}
    others = {record.name for record in used} - of_models
    for field, known in (("margins", others), ("dead_zones", others), ("drift_limits", of_models)):
        for name in getattr(config.compare, field):
            if name not in known:
                among = f"must be among the scorers {sorted(known)} of {path}scorers"
                none = f"must be empty: no scorer of {path}scorers can have such a limit"
                refuse(f"{path}compare.{field}", among if known else none, name)


def check_compared(
    compared: Sequence[ModelRecord | ImageFolder], config: EvaluationConfig, prompts: Sequence[Prompt]
) -> None:
    """Refuse models whose files are gone, images drawn elsewhere that are not all there, and images of
    several sizes. Of many images, ``MAX_HEADERS`` are opened here and all by the stage."""
    texts = [prompt.text for prompt in prompts]
    sizes: dict[str, tuple[int, int]] = {}
    for i, each in enumerate(compared):
        try:
            if isinstance(each, ImageFolder):
                names = find_images(each, texts, config.images_per_prompt)
                shown = [name for of_prompt in names for name in of_prompt]
                sizes[each.name] = check_images(each, shown[:: -(-len(shown) // MAX_HEADERS)])
            else:
                for record in (each, each.adapter_of):
                    if record and record.job is None:
                        sources.check_folder(record.uri)
                sizes[each.name] = models.drawn_size(each, config.sample)
        except ConfigError as error:
            refuse(error.field, error.reason, error.value)
        except ServiceError as error:
            param = f"models.{i}"
            raise type(error)(f"{param}: {error}", param=param, code=error.code) from error
        except (ModelError, OSError) as error:
            param = f"models.{i}"
            raise BadRequest(f"{param}: {each.name} cannot be read: {error}", param=param) from error
    one_size(sizes)


def _check_validation(
    request: AlignmentJobCreate, config: ValidationConfig, used: list[ScorerRecord]
) -> list[str]:
    """Refuse a validation that never runs, measures nothing or has no prompts."""
    training = request.training
    if config.every % training.checkpoint_every:
        why = f"must be a multiple of training.checkpoint_every = {training.checkpoint_every}"
        refuse("validation.every", why, config.every)
    if config.every > training.steps:
        refuse("validation.every", f"must be at most training.steps = {training.steps}", config.every)
    if not config.num_prompts and not training.held_out_pairs:
        why = "must be above 0 where training.held_out_pairs is 0: nothing is measured"
        refuse("validation.num_prompts", why, 0)
    not_measured = _why_not_measured(request, config, used)
    if not_measured:
        refuse("validation.best_metric", not_measured, config.best_metric)
    return _check_validation_prompts(request.evaluation, config, used) if config.num_prompts else []


def _why_not_measured(
    request: AlignmentJobCreate, config: ValidationConfig, used: list[ScorerRecord]
) -> str | None:
    """Why validation will not measure ``best_metric``; None if it will, or if there is none."""
    if config.best_metric is None:
        return None
    if config.best_metric in HELD_OUT_METRICS:
        has_pairs = request.training.held_out_pairs > 0
        return None if has_pairs else "needs training.held_out_pairs greater than 0"
    kinds = {record.name: KINDS[record.kind] for record in used}
    kind = kinds.get(config.best_metric)
    if kind is None:
        return f"must be one of evaluation.scorers, {' or '.join(HELD_OUT_METRICS)}"
    not_scored = why_validation_cannot(kind)
    if not_scored:
        return not_scored
    return None if config.num_prompts else "needs validation.num_prompts greater than 0"


def why_validation_cannot(kind: Kind) -> str | None:
    """Why validation does not score its images with scorers of a kind; None if it does."""
    if kind.level == "prompt":
        return f"is of kind {kind.name}, which compares the images of a prompt: validation draws one"
    if kind.level == "model":
        return f"is of kind {kind.name}, which compares a model with the base, and lower is better"
    return None


def _check_validation_prompts(
    evaluation: EvaluationConfig, config: ValidationConfig, used: list[ScorerRecord]
) -> list[str]:
    """Refuse too few prompts, and those that the scorers cannot score; return warnings."""
    read, param = validation_prompts(evaluation, config)
    _check_scorable(read, evaluation, used, param)
    return long_prompts(read, param)


def validation_prompts(evaluation: EvaluationConfig, config: ValidationConfig) -> tuple[list[Prompt], str]:
    """Validation's prompts, of its own file or after the evaluation's in the same file, and the field that
    chooses them.

    Raises BadRequest for too few.
    """
    if config.prompts_uri:
        uri = config.prompts_uri
        param = "validation.prompts_uri"
        num_skipped = 0
        requirement = ""
    else:
        uri = evaluation.prompts_uri
        param = "validation.num_prompts"
        num_skipped = evaluation.num_prompts
        requirement = f"evaluation.num_prompts requires {num_skipped} and "
    prompts = prompts_of(uri, param)
    needed = config.num_prompts
    if len(prompts) < num_skipped + needed:
        requirement += f"validation.num_prompts requires {needed}"
        message = f"{param}: {uri!r} has {len(prompts)} prompts, {requirement}"
        raise BadRequest(message, param=param, code="too_few_prompts")
    return prompts[num_skipped : num_skipped + needed], param


def long_prompts(prompts: list[Prompt], param: str) -> list[str]:
    """A warning if text encoders certainly cut some of the prompts; else none."""
    long = sum(is_beyond_clip(prompt.text) for prompt in prompts)
    rest = f"have more than {CLIP_TOKENS} tokens: the rest is not read"
    return [f"{param}: {long} of {len(prompts)} prompts {rest}"] if long else []


def prompts_of(uri: str, param: str) -> list[Prompt]:
    """The prompts of a file. Raises BadRequest and NotFound, naming ``param``."""
    try:
        return all_prompts(uri)
    except ServiceError as error:
        message = f"{param}: cannot be read, got {uri!r}: {error}"
        raise type(error)(message, param=param, code=error.code) from error
    except FileNotFoundError as error:
        raise NotFound(f"{param}: {uri!r} does not exist", param=param) from error
    except (OSError, ValueError) as error:
        raise BadRequest(f"{param}: cannot be read, got {uri!r}: {error}", param=param) from error


def _check_scorable(
    prompts: list[Prompt], config: EvaluationConfig, used: list[ScorerRecord], param: str
) -> None:
    """Refuse prompts and image sizes that the built-in scorers cannot score. Others score any."""
    if not any(KINDS[record.kind].is_built_in for record in used):
        return
    try:
        scorers.check([prompt.text for prompt in prompts], config.sample.height, config.sample.width)
    except DataError as error:
        raise BadRequest(f"{param}: {error}", param=param) from error


def refuse(field: str, why: str, value: object) -> NoReturn:
    """Raises BadRequest: ``objective.t_min: must be at most ..., got 3``."""
    raise BadRequest(f"{field}: {why}, got {show(value)}", param=field)
