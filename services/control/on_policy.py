"""Jobs of on-policy methods: their rollouts are checked before anything is stored or spent.

Every function raises BadRequest, naming the field and its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy.orm import Session

from dde_core.config import DataConfig, SampleConfig, TrainConfig
from dde_core.errors import ConfigError, ModelError
from dde_core.methods import METHODS
from dde_core.score_table import Prompt
from dde_core.scorers.kinds import KINDS
from services.api.records import ModelRecord, ScorerRecord
from services.api.requests import (
    HELD_OUT_METRICS,
    AlignmentJobCreate,
    EvaluationConfig,
    Rollouts,
    ValidationConfig,
)
from services.artifacts import models
from services.artifacts.prompts import digest_of
from services.control import checks, making
from services.control.checks import refuse
from services.control.held_out import HeldOut, is_held_out
from services.errors import BadRequest

NAMES = [name for name, method in METHODS.items() if method.on_policy]


def check_request(request: AlignmentJobCreate) -> None:
    """Refuse a dataset or rollouts where the method wants the other, and settings that need a dataset."""
    method = request.objective.method
    rollouts = request.rollouts
    if not METHODS[method].on_policy:
        if rollouts is not None:
            why = f"must be null for method {method!r}, only {' and '.join(NAMES)} draw their own pairs"
            refuse("rollouts", why, rollouts.model_dump(mode="json"))
        if request.dataset is None:
            raise _missing("dataset", f"required by method {method!r}: the id of a registered dataset")
        return
    if request.dataset is not None:
        refuse("dataset", f"must be null for method {method!r}, which draws its own pairs", request.dataset)
    if rollouts is None:
        why = (
            f"required by method {method!r}, which draws its own pairs: prompts_uri, num_prompts and scorers"
        )
        raise _missing("rollouts", why)
    for field, why, value in _unusable(request, rollouts):
        refuse(field, f"{why} for method {method!r}", value)
    for param, uri in _prompts_uris(request):
        if is_held_out(uri):
            why = (
                f"must be a file of prompts for method {method!r}: without a dataset no captions are held out"
            )
            refuse(param, why, uri)


def _missing(param: str, why: str) -> BadRequest:
    return BadRequest(f"{param}: {why}", param=param, code="missing_required_parameter")


def _prompts_uris(request: AlignmentJobCreate) -> Iterator[tuple[str, str | None]]:
    yield "evaluation.prompts_uri", request.evaluation.prompts_uri
    if request.validation is not None:
        yield "validation.prompts_uri", request.validation.prompts_uri


def _unusable(request: AlignmentJobCreate, rollouts: Rollouts) -> Iterator[tuple[str, str, object]]:
    """Settings that cannot be used: field, why, value."""
    training = request.training
    if training.held_out_pairs:
        why = "must be 0, as there are no pairs to hold out,"
        yield "training.held_out_pairs", why, training.held_out_pairs
    if training.caption_dropout:
        why = "must be 0, as each pair is drawn for its prompt,"
        yield "training.caption_dropout", why, training.caption_dropout
    if training.reference == "ledger":
        why = 'must be "auto", as no ledger has the errors of pairs that are drawn later,'
        yield "training.reference", why, training.reference
    if not isinstance(request.workers, int) and request.workers[0] != request.workers[1]:
        why = "must be one number, as more workers would take the room of rollout actors,"
        yield "workers", why, list(request.workers)
    if METHODS[request.objective.method].reward_gradient and rollouts.reward_actors:
        why = "must be 0, as the gradient passes through scorer and U-Net in one process,"
        yield "rollouts.reward_actors", why, rollouts.reward_actors
    validation = request.validation
    if validation is not None and validation.best_metric in HELD_OUT_METRICS:
        why = "must be one of evaluation.scorers, as there are no held-out pairs,"
        yield "validation.best_metric", why, validation.best_metric


def ignored(request: AlignmentJobCreate) -> dict[str, Any]:
    """Settings beside the objective's that have no effect without a dataset, with their values."""
    parts = {"data": [field.name for field in fields(DataConfig)], "training": ["draws", "reference"]}
    defaults = {"data": DataConfig(), "training": TrainConfig()}
    found = {
        f"{part}.{name}": (getattr(getattr(request, part), name), getattr(defaults[part], name))
        for part, names in parts.items()
        for name in names
    }
    return {name: value for name, (value, default) in found.items() if value != default}


def rewards_of(session: Session, request: AlignmentJobCreate) -> list[ScorerRecord]:
    """The scorers of the reward, in the order of their names; none without rollouts.

    Raises NotFound for an unknown one, BadRequest for one that does not score each image.
    """
    if request.rollouts is None:
        return []
    found = making.scorers_of(session, request.rollouts.scorers, "rollouts.scorers")
    return sorted(found, key=lambda record: record.name)


def with_rollouts(
    held_out: HeldOut, request: AlignmentJobCreate, rewards: Sequence[ScorerRecord]
) -> AlignmentJobCreate:
    """The request, whose rollouts have a file of prompts and the names of their scorers, in order."""
    if request.rollouts is None:
        return request
    given = request.rollouts.scorers
    weights = {each.name: given[each.name if each.name in given else each.id] for each in rewards}
    rollouts = held_out.of_rollouts(request.rollouts).model_copy(update={"scorers": weights})
    return request.model_copy(update={"rollouts": rollouts})


def check_rollouts(
    request: AlignmentJobCreate,
    rollouts: Rollouts,
    base: ModelRecord,
    used: Sequence[ScorerRecord],
    rewards: Sequence[ScorerRecord],
) -> tuple[str, list[str]]:
    """The checks that read files. Returns the digest of the prompts, and warnings.

    ``used`` are the records of the evaluation's scorers, ``rewards`` those of the reward.
    """
    _check_gradients(request, rewards)
    _check_guard(rollouts, request.validation, used)
    _check_pairs(request, rollouts, base)
    prompts = making.prompts_to_draw(rollouts.prompts_uri, rollouts.num_prompts, "rollouts")
    texts = [prompt.text for prompt in prompts]
    making.check_scorable(list(rewards), texts, *_drawn_size(base), "rollouts.scorers")
    warnings = checks.long_prompts(prompts, "rollouts.prompts_uri")
    shared = _shared(rollouts, prompts, _compared_prompts(request.evaluation, request.validation))
    return digest_of(prompts), warnings + shared


def _check_gradients(request: AlignmentJobCreate, rewards: Sequence[ScorerRecord]) -> None:
    if not METHODS[request.objective.method].reward_gradient:
        return
    for record in rewards:
        why = KINDS[record.kind].why_no_gradient(record.resize)
        if why is not None:
            message = f"must have gradients for method {request.objective.method!r}: {record.name} {why}"
            refuse("rollouts.scorers", message, record.name)


def _check_guard(
    rollouts: Rollouts, validation: ValidationConfig | None, used: Sequence[ScorerRecord]
) -> None:
    """Refuse a guard on what validation does not measure."""
    if not rollouts.guard:
        return
    param = "rollouts.guard"
    kinds = {record.name: KINDS[record.kind] for record in used}
    for name in rollouts.guard:
        if name not in kinds:
            refuse(param, f"must be among evaluation.scorers {list(kinds)}", name)
        why = checks.why_validation_cannot(kinds[name])
        if why is not None:
            refuse(param, why, name)
    if validation is None or not validation.num_prompts:
        why = "needs validation with num_prompts of 1 or more, which measures the scorers"
        refuse(param, why, list(rollouts.guard))


def _check_pairs(request: AlignmentJobCreate, rollouts: Rollouts, base: ModelRecord) -> None:
    """Refuse rounds that can never have the pairs of their batches: a ranking makes one pair at most."""
    timesteps = int(models.scheduler_config((base.adapter_of or base).uri)["num_train_timesteps"])
    starts = request.objective.ranked_starts(timesteps)
    most = rollouts.prompts_per_round * rollouts.max_blocks * len(starts)
    needed = request.training.batch_size * rollouts.updates_per_round
    if most < needed:
        why = (
            f"must be larger, or training.batch_size smaller: {rollouts.max_blocks} blocks of trajectories "
            f"with {len(starts)} ranked transitions make at most {most} pairs, and a round needs {needed}"
        )
        refuse("rollouts.prompts_per_round", why, rollouts.prompts_per_round)


def _drawn_size(base: ModelRecord) -> tuple[int, int]:
    """Height and width in pixels of what the base draws; its files may have changed since registration."""
    try:
        return models.drawn_size(base, SampleConfig())
    except (ConfigError, ModelError, OSError) as error:
        raise BadRequest(f"model: {base.name} cannot be read: {error}", param="model") from error


def _compared_prompts(
    evaluation: EvaluationConfig, validation: ValidationConfig | None
) -> dict[str, list[Prompt]]:
    """The prompts that models are compared on, by the fields that name them."""
    param = "evaluation.prompts_uri"
    found = {param: checks.prompts_of(evaluation.prompts_uri, param)[: evaluation.num_prompts]}
    if validation is not None and validation.num_prompts:
        found["validation's prompts"] = checks.validation_prompts(evaluation, validation)[0]
    return found


def shared_prompts(rollouts: Rollouts, compared: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """A warning for prompts of the rollouts that models are ``compared`` on, by what names those.

    Raises BadRequest for them unless the rollouts allow it, and for prompts that cannot be read.
    """
    prompts = making.prompts_to_draw(rollouts.prompts_uri, rollouts.num_prompts, "rollouts")
    return _shared(rollouts, prompts, compared)


def _shared(
    rollouts: Rollouts, prompts: Sequence[Prompt], compared: Mapping[str, Sequence[Prompt]]
) -> list[str]:
    texts = {prompt.text for prompt in prompts}
    warnings = []
    for where, others in compared.items():
        shared = texts & {prompt.text for prompt in others}
        if not shared:
            continue
        message = (
            f"rollouts.prompts_uri: {len(shared)} of its prompts are among {where}, such as {min(shared)!r}: "
            "the model is trained on what it is compared on"
        )
        if not rollouts.allow_evaluation_prompts:
            what = "give other prompts, or set rollouts.allow_evaluation_prompts"
            raise BadRequest(f"{message}; {what}", param="rollouts.prompts_uri", code="trained_on_prompts")
        warnings.append(message)
    return warnings
