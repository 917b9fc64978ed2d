"""Datasets that scorers make: requested, reviewed like a job, and completed by the run's result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from dde_core.errors import DataError
from dde_core.score_table import Prompt
from dde_core.scorers.kinds import KINDS
from services.api.answers import DatasetView, EventView, ListView
from services.api.records import PairsResult, ScorerRecord
from services.api.requests import DatasetCreate, DatasetSource, EvaluationConfig, GeneratePairs, Relabel
from services.artifacts.prompts import digest_of, read_prompts
from services.artifacts.scorers import load
from services.control import checks, journal, models, scorers, stopping
from services.control.database import ProjectDatabase
from services.control.idempotency import IdempotentRequest, create_once
from services.control.job_update import new_job
from services.control.launchers.clusters import placed
from services.control.listing import by_id, is_id, list_view
from services.control.problems import show
from services.control.tables import Dataset, Job, new_id
from services.control.views import dataset_view
from services.errors import BadRequest, Conflict, NotFound, ServiceError
from services.pairs.images import BadImage, decode_whole
from services.pairs.row import MAX_CAPTION_CHARS
from services.pairs.source import Source, open_source
from services.settings import Settings
from services.stages import layout
from services.storage import files


@dataclass(frozen=True)
class Order:
    """What a run makes a dataset of: its kind, the request as stored, and the inputs as they are now."""

    kind: str
    request: dict[str, Any]
    inputs: dict[str, Any]
    model: str
    dataset: str | None
    about: str


def create(
    database: ProjectDatabase,
    root: str,
    settings: Settings,
    idempotent: IdempotentRequest,
    request: DatasetCreate,
) -> DatasetView:
    """Start a run that makes the dataset.

    Raises BadRequest, NotFound and Conflict for what is known to fail before anything is spent.
    """

    def prepare() -> Order:
        if request.generate is not None:
            return _order_images(database, placed(settings, request.generate, "generate.cluster"))
        assert request.relabel is not None
        return _order_labels(database, placed(settings, request.relabel, "relabel.cluster"))

    def insert(session: Session, order: Order) -> DatasetView:
        if order.model:
            models.find(session, order.model, "generate.model")
        if order.dataset:
            ready(session, order.dataset, "relabel.dataset")
        param = "generate.scorers" if order.kind == "generate" else "relabel.scorer"
        for each in order.inputs["scorers"]:
            scorers.find(session, each["id"], param)
        job = new_job(new_id("djob"), order.kind, "queued", order.request)
        dataset_id = new_id("ds")
        output = layout.made_folder(root, dataset_id)
        job.model = order.model
        job.dataset = order.dataset
        job.inputs = {**order.inputs, "output": output}
        uri = layout.made_pairs_folder(output)
        row = Dataset(
            id=dataset_id, name=request.name, uri=uri, columns={}, job=job.id, created_at=job.created_at
        )
        session.add_all([job, row])
        session.flush()
        journal.log(session, job.id, f"created: {order.about}")
        return dataset_view(row, job)

    return create_once(database, idempotent, DatasetView, prepare, insert)


def _order_images(database: ProjectDatabase, wanted: GeneratePairs) -> Order:
    with database.read() as session:
        model = models.record_of(models.find(session, wanted.model, "generate.model"))
        used = scorers_of(session, wanted.scorers, "generate.scorers")
    checks.check_folders(model, "generate.model")
    prompts = prompts_to_draw(wanted.prompts_uri, wanted.num_prompts, "generate")
    texts = [prompt.text for prompt in prompts]
    check_scorable(used, texts, wanted.sample.height, wanted.sample.width, "generate.scorers")
    return Order(
        kind="generate",
        request={
            **wanted.model_dump(mode="json"),
            "prompts_uri": files.as_uri(wanted.prompts_uri),
            "scorers": dict(zip((record.name for record in used), wanted.scorers.values(), strict=True)),
        },
        inputs={
            "model": model.model_dump(mode="json"),
            "scorers": records(used),
            "prompts_digest": digest_of(prompts),
        },
        model=model.id,
        dataset=None,
        about=f"{model.name} draws {wanted.images_per_prompt} images of {len(prompts)} prompts",
    )


def _order_labels(database: ProjectDatabase, wanted: Relabel) -> Order:
    with database.read() as session:
        row = ready(session, wanted.dataset, "relabel.dataset")
        used = scorers_of(session, [wanted.scorer], "relabel.scorer")
    source = open_source(DatasetSource(uri=row.uri, columns=cast(Any, row.columns), split=row.split))
    _check_captions(source, used)
    columns = ("uri", "columns", "split", "digest")
    return Order(
        kind="relabel",
        request={**wanted.model_dump(mode="json"), "scorer": used[0].name},
        inputs={
            "dataset": {name: getattr(row, name) for name in columns},
            "scorers": records(used),
        },
        model="",
        dataset=row.id,
        about=f"{used[0].name} labels the {(row.counts or {})['pairs']} pairs of {row.name}",
    )


def scorers_of(session: Session, names: Iterable[str], param: str) -> list[ScorerRecord]:
    """The records of these scorers, in order.

    Raises NotFound for an unknown name or id, BadRequest for a scorer that does not rank images by themselves
    and for one that has been given twice, by its name and by its id.
    """
    found: list[ScorerRecord] = []
    for name in names:
        record = scorers.find(session, name, param)
        kind = KINDS[record.kind]
        if kind.level != "image":
            whose = "all images of a prompt" if kind.level == "prompt" else "all images of a model"
            message = f"{param}: must score each image, got {name!r}, whose number belongs to {whose}"
            raise BadRequest(message, param=param, code="scorer_not_of_images")
        if record in found:
            message = f"{param}: must not repeat, got {record.name!r} and its id {record.id!r}"
            raise BadRequest(message, param=param)
        found.append(record)
    return found


def records(used: list[ScorerRecord]) -> list[dict[str, Any]]:
    """Scorers as a job's inputs store them."""
    return [record.model_dump(mode="json") for record in used]


def prompts_to_draw(uri: str, num_prompts: int, part: str) -> list[Prompt]:
    """The first prompts of a file. ``part`` of the request is what names it.

    Raises BadRequest for too few, and for one that no row may have as its caption.
    """
    param = f"{part}.prompts_uri"
    prompts = checks.prompts_of(uri, param)
    if len(prompts) < num_prompts:
        message = f"{param}: {uri!r} has {len(prompts)} prompts, {part}.num_prompts requires {num_prompts}"
        raise BadRequest(message, param=param, code="too_few_prompts")
    prompts = prompts[:num_prompts]
    for number, prompt in enumerate(prompts, 1):
        if len(prompt.text) > MAX_CAPTION_CHARS:
            message = f"{param}: prompt {number} of {uri!r} has {len(prompt.text)} characters, "
            raise BadRequest(f"{message}at most {MAX_CAPTION_CHARS} are possible", param=param)
    return prompts


def check_scorable(used: list[ScorerRecord], prompts: list[str], height: int, width: int, param: str) -> None:
    """Refuse prompts and a size in pixels that a scorer cannot score; only built-in ones have limits."""
    for record in used:
        if not KINDS[record.kind].is_built_in:
            continue
        try:
            load(record).check(prompts, height, width)
        except DataError as error:
            raise BadRequest(f"{param}: {record.name} cannot score: {error}", param=param) from error


def _check_captions(source: Source, used: list[ScorerRecord]) -> None:
    """Refuse captions, and the first image that can be read, if the scorer cannot score them."""
    if not any(KINDS[record.kind].is_built_in for record in used):
        return
    height, width = 0, 0
    captions: set[str] = set()
    for unit in source.units():
        captions.update(row.caption for row in source.rows(unit) if row.kind == "decided")
        if not height:
            height, width = _first_size(source, unit)
    check_scorable(used, sorted(captions), height, width, "relabel.scorer")


def _first_size(source: Source, unit: Any) -> tuple[int, int]:
    """The height and width of a unit's first decided image; zeros if there is none that can be read."""
    for row in source.rows(unit, with_images=True):
        if row.kind == "decided":
            try:
                height, width, _ = decode_whole(source.load(row.images[0])).shape
            except BadImage:
                return 0, 0
            return height, width
    return 0, 0


# ---- datasets that may not be ready


def ready(session: Session, dataset_id: str, param: str) -> Dataset:
    """The dataset with this id. Raises NotFound, and Conflict while, or because, it has no pairs."""
    row = session.scalar(select(Dataset).where(Dataset.id == dataset_id)) if is_id(dataset_id) else None
    if row is None:
        message = f"{param}: dataset {show(dataset_id)} does not exist"
        raise NotFound(message, param=param, code="dataset_not_found")
    if row.digest is None:
        view = dataset_view(row, job_of(session, row))
        why = f"it has failed: {view.reason}" if view.reason else f"{row.job} is making it"
        message = f"{param}: dataset {row.id} is not ready, {why}"
        raise Conflict(message, param=param, code="dataset_not_ready")
    return row


def job_of(session: Session, row: Dataset) -> Job | None:
    """The run that makes the dataset, or has made it."""
    return session.scalar(select(Job).where(Job.id == row.job)) if row.job else None


def jobs_of(session: Session, rows: Iterable[Dataset]) -> Mapping[str | None, Job]:
    """The runs that make these datasets, by id."""
    ids = [row.job for row in rows if row.job]
    return {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(ids)))} if ids else {}


def complete(session: Session, job: Job, result: PairsResult) -> None:
    """Write what the run has found into its dataset's row: jobs may use it from now on."""
    found = {
        "digest": result.digest,
        "counts": result.counts.model_dump(),
        "example": result.example.model_dump(),
    }
    session.execute(update(Dataset).where(Dataset.job == job.id).values(**found))


def cancel(database: ProjectDatabase, dataset_id: str) -> DatasetView:
    """Request that a dataset is not made. Raises NotFound, and Conflict if it is ready or has failed."""
    with database.write() as session:
        row = by_id(session, Dataset, dataset_id)
        job = job_of(session, row)
        if job is None:
            message = f"dataset {row.id} was registered: nothing is making it"
            raise Conflict(message, param="id", code="dataset_ready")
        return dataset_view(row, stopping.request_cancel(session, job.id, job.kind))


def list_events(
    database: ProjectDatabase, dataset_id: str, after: str | None, limit: int
) -> ListView[EventView]:
    """The events of the run that makes a dataset; a registered one has none. Raises NotFound."""
    with database.read() as session:
        job = job_of(session, by_id(session, Dataset, dataset_id))
    return journal.list_events(database, job.kind, job.id, after, limit) if job else list_view([], limit)


def unchanged_prompts(uri: str, num_prompts: int, digest: str) -> list[Prompt] | None:
    """The first prompts of a file, of which a job stored the ``digest``; None if they have changed."""
    try:
        prompts = read_prompts(uri, num_prompts)
    except (ServiceError, OSError):
        return None
    return prompts if digest_of(prompts) == digest else None


def reused_prompts(
    database: ProjectDatabase, dataset_id: str | None, evaluation: EvaluationConfig
) -> list[str]:
    """A warning if an evaluation has prompts whose images are in the dataset: they are not held out."""
    with database.read() as session:
        is_known = dataset_id is not None and is_id(dataset_id)
        row = session.scalar(select(Dataset).where(Dataset.id == dataset_id)) if is_known else None
        job = job_of(session, row) if row else None
    if job is None or job.kind != "generate":
        return []
    drawn = GeneratePairs.model_validate_json(json.dumps(job.request))
    prompts = unchanged_prompts(drawn.prompts_uri, drawn.num_prompts, job.inputs["prompts_digest"])
    if prompts is None:
        return [
            f"{drawn.prompts_uri!r} has changed since the dataset was made of it: "
            "nobody can tell whether evaluation.prompts_uri holds prompts that are not held out"
        ]
    own = checks.prompts_of(evaluation.prompts_uri, "evaluation.prompts_uri")[: evaluation.num_prompts]
    shared = {prompt.text for prompt in own} & {prompt.text for prompt in prompts}
    if not shared:
        return []
    return [
        f"{len(shared)} prompts of the evaluation made the dataset, too, such as {min(shared)!r}: "
        "on them nothing is held out; set evaluation.prompts_uri to others"
    ]
