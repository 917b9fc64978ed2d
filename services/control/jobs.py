"""Alignment jobs and evaluations: created after every check that costs little, read and listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, aliased, defer

from dde_core.errors import DataError
from dde_core.scorers.kinds import KINDS
from services.api.answers import CheckpointView, EvaluationView, JobView, ListView, RunView
from services.api.records import JobStatus, ModelRecord, Validated
from services.api.requests import AlignmentJobCreate, EvaluationCreate, ImageFolder, NamedModel
from services.artifacts import checkpoints
from services.control import checks, journal, making, models, on_policy, scorers, waiting
from services.control.database import ProjectDatabase
from services.control.held_out import HeldOut, is_held_out
from services.control.idempotency import IdempotentRequest, create_once
from services.control.job_update import new_job
from services.control.listing import by_id, is_id, list_view, newest
from services.control.problems import show
from services.control.tables import Dataset, Job, JobMetadata, Model, new_id
from services.control.transitions import writes_ledger
from services.control.views import checkpoint_view, evaluation_view, job_view
from services.errors import BadRequest, NotFound
from services.settings import Settings
from services.stages import layout
from services.storage import files


@dataclass(frozen=True)
class Checked:
    """A request with files of all prompts, the digest of those of its rollouts, and warnings."""

    request: AlignmentJobCreate
    prompts_digest: str | None
    warnings: list[str]


def create_alignment(
    database: ProjectDatabase, root: str, idempotent: IdempotentRequest, request: AlignmentJobCreate
) -> JobView:
    """Raises BadRequest, NotFound or Conflict for all that is known to fail before compute is spent."""

    def check() -> Checked:
        return check_alignment(database, HeldOut(database, root), request)

    def insert(session: Session, checked: Checked) -> JobView:
        return job_view(insert_alignment(session, new_id("ajob"), checked))

    return create_once(database, idempotent, JobView, check, insert)


def check_alignment(database: ProjectDatabase, held_out: HeldOut, request: AlignmentJobCreate) -> Checked:
    """The checks that read files. Raises BadRequest, NotFound or Conflict."""
    on_policy.check_request(request)
    with database.read() as session:
        used = scorers.of_names(session, request.evaluation.scorers, "evaluation.scorers")
        rewards = on_policy.rewards_of(session, request)
    found = held_out.of_job(on_policy.with_rollouts(held_out, request, rewards))
    warnings = checks.check_alignment(found, used)
    with database.read() as session:
        base = models.record_of(models.find(session, request.model, "model"))
    checks.check_base(base, found)
    if found.rollouts is not None:
        digest, of_rollouts = on_policy.check_rollouts(found, found.rollouts, base, used, rewards)
        return Checked(found, digest, warnings + of_rollouts)
    if not is_held_out(request.evaluation.prompts_uri):
        warnings += making.reused_prompts(database, request.dataset, request.evaluation)
    return Checked(found, None, warnings)


def find_inputs(session: Session, request: AlignmentJobCreate) -> tuple[Model, Dataset | None]:
    """The base model and the dataset of a request. Raises BadRequest, NotFound or Conflict."""
    return models.find(session, request.model, "model"), _find_dataset(session, request)


def insert_alignment(session: Session, job_id: str, checked: Checked) -> Job:
    """Add the row of a job. Raises BadRequest, NotFound or Conflict for what the database knows to fail."""
    request = checked.request
    base, dataset = find_inputs(session, request)
    name = request.name or f"{base.name[:40]}-{request.objective.method}-{job_id[-6:]}"
    refuse_name(session, name)
    stored = _stored_request(request)
    row = new_job(job_id, "alignment", "validating", stored)
    row.name = name
    row.model = base.id
    row.dataset = dataset.id if dataset else None
    row.output_model = new_id("model")
    row.inputs = {
        "model": models.record_of(base).model_dump(mode="json"),
        "scorers": scorer_inputs(session, request.evaluation.scorers, "evaluation.scorers"),
    }
    if dataset is not None:
        columns = ("uri", "columns", "split", "digest")
        row.inputs["dataset"] = {name: getattr(dataset, name) for name in columns}
        pairs = f"dataset {dataset.name}"
    else:
        row.inputs["rewards"] = making.records(on_policy.rewards_of(session, request))
        row.inputs["prompts_digest"] = checked.prompts_digest
        pairs = f"prompts {stored['rollouts']['prompts_uri']}"
    session.add(row)
    session.flush()
    session.add_all(
        JobMetadata(job_seq=row.seq, key=key, value=value) for key, value in request.metadata.items()
    )
    method = request.objective.method
    journal.log(session, job_id, f"created: {method} on {base.name} with {pairs}")
    for message in [*_ignored_settings(request, stored, row.inputs["scorers"]), *checked.warnings]:
        journal.log(session, job_id, message, "warning")
    return row


def create_evaluation(
    database: ProjectDatabase, root: str, idempotent: IdempotentRequest, request: EvaluationCreate
) -> EvaluationView:
    """Raises BadRequest, NotFound or Conflict, like ``create_alignment``."""

    def compared() -> Sequence[Any]:
        with database.read() as session:
            return _compared(session, request)[0]

    def check() -> tuple[EvaluationCreate, list[str]]:
        with database.read() as session:
            used = scorers.of_names(session, request.scorers, "scorers")
        found = HeldOut(database, root).of_evaluation(request, compared)
        prompts = checks.check_evaluation(found, used)
        checks.check_compared(compared(), found, prompts)
        return found, checks.long_prompts(prompts, "prompts_uri")

    def insert(session: Session, checked: tuple[EvaluationCreate, list[str]]) -> EvaluationView:
        return evaluation_view(insert_evaluation(session, new_id("eval"), *checked))

    return create_once(database, idempotent, EvaluationView, check, insert)


def insert_evaluation(
    session: Session, evaluation_id: str, request: EvaluationCreate, warnings: Sequence[str]
) -> Job:
    """Add the row of an evaluation. Raises BadRequest or NotFound for what the database knows to fail."""
    compared, base = _compared(session, request)
    stored = request.model_dump(mode="json")
    stored["prompts_uri"] = files.as_uri(request.prompts_uri)
    stored["models"] = [
        {"name": each.name, "images_uri": files.as_uri(each.images_uri)}
        if isinstance(each, ImageFolder)
        else {"name": each.name, "model": each.id}
        for each in compared
    ]
    stored["base"] = base.name
    row = new_job(evaluation_id, "evaluation", "queued", stored)
    row.model = next(each.id for each in compared if isinstance(each, ModelRecord))
    row.base = base.id if isinstance(base, ModelRecord) else None
    row.inputs = {
        "models": [each.model_dump(mode="json") for each in compared],
        "scorers": scorer_inputs(session, request.scorers, "scorers"),
    }
    session.add(row)
    session.flush()
    others = ", ".join(each.name for each in compared if each is not base)
    journal.log(session, row.id, f"created: {others} against {base.name}")
    for message in warnings:
        journal.log(session, row.id, message, "warning")
    return row


def _compared(
    session: Session, request: EvaluationCreate
) -> tuple[list[ModelRecord | ImageFolder], ModelRecord | ImageFolder]:
    """What the request compares, and the base among it. Raises BadRequest or NotFound."""
    compared: list[ModelRecord | ImageFolder] = []
    base: ModelRecord | ImageFolder | None = None
    for i, each in enumerate(request.models):
        if isinstance(each, ImageFolder):
            found: ModelRecord | ImageFolder = each
            is_base = request.base == each.name
        elif isinstance(each, NamedModel):
            record = models.record_of(models.find(session, each.model, f"models.{i}.model"))
            found = record.model_copy(update={"name": each.name})
            is_base = request.base == each.name
        else:
            found = models.record_of(models.find(session, each, f"models.{i}"))
            is_base = request.base in (each, found.id, found.name)
        if any(other.name == found.name for other in compared):
            message = f"models: must have different names, got {show(found.name)} twice"
            raise BadRequest(message, param="models", code="repeated_model")
        compared.append(found)
        base = found if is_base else base
    if not any(isinstance(each, ModelRecord) for each in compared):
        names = ", ".join(show(each.name) for each in compared)
        message = f"models: at least one must be a registered model, got the folders of images {names}"
        raise BadRequest(message, param="models")
    if request.base is not None and base is None:
        names = ", ".join(show(each.name) for each in compared)
        raise BadRequest(f"base: must be one of the models {names}, got {show(request.base)}", param="base")
    return compared, base or compared[0]


def get(database: ProjectDatabase, settings: Settings, kind: str, job_id: str) -> RunView:
    """Raises NotFound."""
    with database.read() as session:
        row = by_id(session, Job, job_id, kind)
    return waiting.run_views(database, settings, kind, [row])[0]


def page(
    database: ProjectDatabase,
    settings: Settings,
    kind: str,
    after: str | None,
    limit: int,
    status: JobStatus | None,
    metadata: Mapping[str, str],
) -> ListView[RunView]:
    """Jobs of one kind, newest first, that have this status and all of this metadata."""
    query = select(Job).options(defer(Job.inputs, raiseload=True)).where(Job.kind == kind)
    if status is not None:
        query = query.where(Job.status == status)
    order: Any = Job.seq
    for key, value in metadata.items():
        row = aliased(JobMetadata)
        query = query.join(row, (row.job_seq == Job.seq) & (row.key == key) & (row.value == value))
        order = row.job_seq  # equals Job.seq, but is read from the index on metadata
    with database.read() as session:
        rows = newest(session, Job, query, after, limit, order)
    return list_view(waiting.run_views(database, settings, kind, rows), limit)


def credit(database: ProjectDatabase, job_id: str) -> bytes:
    """An alignment job's credit record as JSON. Raises NotFound for a job that has none (yet)."""
    with database.read() as session:
        row = by_id(session, Job, job_id, "alignment")
    trained = row.results.get("train")
    if trained is not None:
        try:
            return files.read_bytes(layout.credit_uri(trained["model"]["uri"]))
        except FileNotFoundError:
            pass
    why = "its model has none" if trained else "it is written when training is done"
    message = f"job {job_id} has no credit record: {why}; the job is {row.status}"
    raise NotFound(message, param="id", code="credit_not_found")


def list_checkpoints(
    database: ProjectDatabase, root: str, job_id: str, after: int | None, limit: int
) -> ListView[CheckpointView]:
    """The checkpoints of an alignment job beyond step ``after``, in order of steps, with their validation."""
    with database.read() as session:
        by_id(session, Job, job_id, "alignment")
    run = layout.run_folder(root, job_id)
    steps = (step for step in checkpoints.steps(run) if after is None or step > after)
    views = (_checkpoint(run, step) for step in steps)
    readable = (view for view in views if view is not None)
    return list_view(list(islice(readable, limit + 1)), limit)


def _checkpoint(run: str, step: int) -> CheckpointView | None:
    """None if training has deleted the checkpoint in the meantime, or its record is damaged."""
    try:
        record = checkpoints.read(run, step)
    except (FileNotFoundError, DataError):
        return None
    try:
        validation = Validated.model_validate_json(files.read_bytes(layout.outcome_uri(run, step)))
    except (FileNotFoundError, ValueError):
        validation = None
    return checkpoint_view(record, layout.checkpoint_folder(run, step), validation)


def base_named(session: Session, name: str) -> str | None:
    """The id of the base model with this name."""
    return session.scalar(select(Model.id).where(Model.name == name, Model.base.is_(None)).limit(1))


def scorer_inputs(session: Session, names: list[str], field: str) -> list[dict[str, Any]]:
    """The records of a job's scorers as they are now: a later deletion changes nothing for the job."""
    return [record.model_dump(mode="json") for record in scorers.of_names(session, names, field)]


def _stored_request(request: AlignmentJobCreate) -> dict[str, Any]:
    """The body as the job keeps it: paths of prompts as URIs."""
    stored = request.model_dump(mode="json")
    for part in (stored["evaluation"], stored["validation"] or {}, stored["rollouts"] or {}):
        if part.get("prompts_uri"):
            part["prompts_uri"] = files.as_uri(part["prompts_uri"])
    return stored


def _ignored_settings(
    request: AlignmentJobCreate, stored: dict[str, Any], used: list[dict[str, Any]]
) -> Iterator[str]:
    """A warning for each setting that has no effect on this job. ``used`` are the records of its scorers."""
    method = request.objective.method
    for setting, value in request.objective.ignored().items():
        yield f"method {method!r} ignores objective.{setting} = {value}"
    if request.training.reference == "ledger" and not writes_ledger(stored):
        yield f"method {method!r} ignores training.reference = 'ledger'"
    if request.rollouts is not None:
        for setting, value in on_policy.ignored(request).items():
            yield f"method {method!r} ignores {setting} = {value}"
    validation = request.validation
    if validation and validation.prompts_uri and not validation.num_prompts:
        yield "validation.prompts_uri is ignored: validation.num_prompts is 0"
    if validation and validation.num_prompts:
        for record in used:
            why = checks.why_validation_cannot(KINDS[record["kind"]])
            if why:
                yield f"validation does not measure {record['name']}: it {why}"


def _find_dataset(session: Session, request: AlignmentJobCreate) -> Dataset | None:
    """The dataset of a request, checked against it; None where it has rollouts.

    Raises NotFound, BadRequest and Conflict.
    """
    if request.dataset is None:
        return None
    row = making.ready(session, request.dataset, "dataset")
    checks.check_dataset(row, request)
    return row


def refuse_name(session: Session, name: str) -> None:
    """Raises BadRequest for an aligned model's name that is an id or a base model's name."""
    if is_id(name):
        raise BadRequest(f"name: must not have the form of an id, got {name!r}", param="name")
    base = base_named(session, name)
    if base:
        message = f"name: belongs to the base model {base}, got {name!r}"
        raise BadRequest(message, param="name", code="name_taken")
