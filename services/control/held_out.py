"""``held-out:`` among the prompts of a request: a dataset's captions that its models are not trained on;
and ``captions:``, all of its captions, for models to be trained on.

They are written to storage when the request is checked, and the request is stored with the file's URI: jobs
and their stages read it like any other file of prompts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from dde_core.errors import ModelError
from services.api.records import ModelRecord
from services.api.requests import (
    CAPTIONS,
    HELD_OUT,
    AlignmentJobCreate,
    DatasetSource,
    EvaluationConfig,
    EvaluationCreate,
    Rollouts,
    StudyCreate,
    StudyEvaluation,
)
from services.artifacts import captions
from services.artifacts.prompts import all_prompts
from services.control import making, models
from services.control.checks import refuse
from services.control.database import ProjectDatabase
from services.control.tables import Dataset, Job
from services.errors import BadRequest
from services.pairs.columnar import unreadable
from services.pairs.source import open_source
from services.pairs.validation import captions_of
from services.stages import layout
from services.storage import files

Config = TypeVar("Config", bound=EvaluationConfig)
FORM = "held-out:DATASET?pairs=N"
_FORM = re.compile(rf"{HELD_OUT}(\w+)\?pairs=([1-9][0-9]{{0,8}})")


@dataclass(frozen=True)
class Prompts:
    """A file of held-out captions, and how many it has."""

    uri: str
    count: int
    dataset: str
    pairs: int


@dataclass
class HeldOut:
    """Resolves the ``held-out:`` of one request. Each file is made once."""

    database: ProjectDatabase
    root: str
    _made: dict[tuple[str, int, tuple[str, ...]], Prompts] = field(default_factory=dict)

    def of_job(self, request: AlignmentJobCreate) -> AlignmentJobCreate:
        """The job with its captions that ``training.held_out_pairs`` keep out of its training.

        Raises BadRequest, naming the field, for another dataset's captions, for too few, and for a base that
        was itself trained on them; NotFound and Conflict for the dataset.
        """
        validation = request.validation
        uris = {"evaluation": request.evaluation.prompts_uri}
        if validation is not None and validation.prompts_uri is not None:
            uris["validation"] = validation.prompts_uri
        parts = [part for part, uri in uris.items() if is_held_out(uri)]
        if not parts:
            return request
        if len(parts) > 1:
            why = "must be null where evaluation.prompts_uri is held out: its captions follow"
            refuse("validation.prompts_uri", why, uris["validation"])
        [part] = parts
        param = f"{part}.prompts_uri"
        if uris[part] != HELD_OUT:
            why = f"must be {HELD_OUT!r} in a job, the captions that training.held_out_pairs keep out of it"
            refuse(param, why, uris[part])
        found = self.of_training(request, param)
        uses_them = validation is not None and (part == "validation" or validation.prompts_uri is None)
        num_validated = validation.num_prompts if validation and uses_them else 0
        _check_count(found, request.evaluation.num_prompts if part == "evaluation" else 0, num_validated)
        config = getattr(request, part).model_copy(update={"prompts_uri": found.uri})
        return request.model_copy(update={part: config})

    def of_rollouts(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts with a dataset's captions as a file, if that is what they name.

        Raises BadRequest, NotFound and Conflict for the dataset.
        """
        uri = rollouts.prompts_uri
        if not uri.startswith(CAPTIONS):
            return rollouts
        param = "rollouts.prompts_uri"
        with self.database.read() as session:
            row = making.ready(session, uri.removeprefix(CAPTIONS), param)
        found = layout.captions_uri(self.root, row.id)
        if not files.exists(found):
            texts = (caption.strip() for caption in _counted(row, param))
            files.write_bytes(found, "".join(_lines(dict.fromkeys(filter(None, texts)))).encode())
        return rollouts.model_copy(update={"prompts_uri": found})

    def of_training(self, request: AlignmentJobCreate, param: str) -> Prompts:
        """The captions of its dataset that a job does not train on."""
        assert request.dataset is not None
        num_pairs = request.training.held_out_pairs
        if not num_pairs:
            why = "must be above 0: no caption is held out"
            raise BadRequest(f"training.held_out_pairs: {why}, got 0", param="training.held_out_pairs")
        with self.database.read() as session:
            base = models.record_of(models.find(session, request.model, "model"))
        return self._prompts(request.dataset, num_pairs, [base], param)

    def of_evaluation(
        self, request: EvaluationCreate, compared: Callable[[], Sequence[Any]]
    ) -> EvaluationCreate:
        """The evaluation with the captions that none of the ``compared`` models was trained on.

        Raises BadRequest, NotFound and Conflict like ``of_job``.
        """
        if not is_held_out(request.prompts_uri):
            return request
        dataset, num_pairs = _parse(request.prompts_uri, "prompts_uri")
        records = [each for each in compared() if isinstance(each, ModelRecord)]
        return _with(request, self._prompts(dataset, num_pairs, records, "prompts_uri"))

    def of_study(
        self, evaluation: StudyEvaluation, cells: Mapping[str, AlignmentJobCreate], base: str | None
    ) -> StudyEvaluation:
        """The study's evaluation with the captions that no cell trains on. ``cells`` are by label.

        Raises BadRequest where the cells hold different captions out, and like ``of_job``.
        """
        param = "evaluation.prompts_uri"
        if not is_held_out(evaluation.prompts_uri):
            return evaluation
        if evaluation.prompts_uri == HELD_OUT:
            for label, cell in cells.items():
                if cell.dataset is None:
                    why = f"must be {FORM} or a file of prompts: cell {label} has no dataset"
                    refuse(param, why, HELD_OUT)
            of_cells = [self.of_training(cell, param) for cell in cells.values()]
            found = {prompts.uri: prompts for prompts in of_cells}
            if len(found) > 1:
                names = " and ".join(sorted(f"{each.dataset}?pairs={each.pairs}" for each in found.values()))
                refuse(param, f"must be {FORM}, as the cells hold out {names}", HELD_OUT)
            return _with(evaluation, next(iter(found.values())))
        dataset, num_pairs = _parse(evaluation.prompts_uri, param)
        names_of_models = dict.fromkeys([cell.model for cell in cells.values()] + ([base] if base else []))
        with self.database.read() as session:
            digest = making.ready(session, dataset, param).digest
            records = [models.record_of(models.find(session, name, "model")) for name in names_of_models]
            for label, cell in cells.items():
                if cell.dataset is None:
                    continue
                own = making.ready(session, cell.dataset, f"cells.{label}.dataset").digest
                if own == digest and cell.training.held_out_pairs < num_pairs:
                    why = f"holds out {num_pairs} pairs, cell {label} {cell.training.held_out_pairs}"
                    refuse(param, f"{why}: it would be trained on captions of", evaluation.prompts_uri)
        return _with(evaluation, self._prompts(dataset, num_pairs, records, param))

    def _prompts(self, dataset: str, num_pairs: int, records: list[ModelRecord], param: str) -> Prompts:
        key = (dataset, num_pairs, tuple(record.id for record in records))
        if key not in self._made:
            with self.database.read() as session:
                row = making.ready(session, dataset, param)
                trainings = [(record, job) for record in records for job in _trainings(session, record)]
            for record, job in trainings:
                if "dataset" in job.inputs:
                    _refuse_trained(record, job, row, num_pairs, param)
            found = self._write(row, num_pairs, records, param)
            for record, job in trainings:
                if "dataset" not in job.inputs:
                    _refuse_drawn(record, job, found, param)
            self._made[key] = found
        return self._made[key]

    def _write(self, row: Dataset, num_pairs: int, records: list[ModelRecord], param: str) -> Prompts:
        """The file with these captions, written once: neither registered rows nor tokenizers change."""
        try:
            key = captions.digest_of(records)
            uri = layout.held_out_uri(self.root, row.id, num_pairs, key)
            if not files.exists(uri):
                counted = _counted(row, param)
                found = captions.held_out(counted, records, num_pairs)
                files.write_bytes(uri, "".join(_lines(found)).encode())
        except (ModelError, OSError) as error:
            raise BadRequest(f"{param}: captions cannot be tokenized: {error}", param=param) from error
        return Prompts(uri, files.read_bytes(uri).count(b"\n"), row.id, num_pairs)


def _counted(row: Dataset, param: str) -> Counter[str]:
    """How many pairs each caption of the dataset has. Raises BadRequest where its rows have changed."""
    source = DatasetSource(uri=row.uri, columns=cast(Any, row.columns), split=row.split)
    try:
        return captions_of(open_source(source), str(row.digest), param)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(error, row.uri, "cannot be read") from error


def reads_a_dataset(request: AlignmentJobCreate | EvaluationCreate | StudyCreate) -> bool:
    """Whether the request may have to read all rows of a dataset."""
    body = request.model_dump_json()
    return HELD_OUT in body or CAPTIONS in body


def is_held_out(uri: str | None) -> bool:
    """Whether a URI of prompts means held-out captions."""
    return uri is not None and uri.startswith(HELD_OUT)


def _lines(found: Iterable[str]) -> Iterator[str]:
    return (json.dumps({"prompt": caption}) + "\n" for caption in found)


def _parse(uri: str, param: str) -> tuple[str, int]:
    match = _FORM.fullmatch(uri)
    if match is None:
        refuse(param, f"must be {FORM}, with the dataset's id and how many of its pairs are held out", uri)
    return match[1], int(match[2])


def _with(config: Config, found: Prompts) -> Config:
    _check_count(found, config.num_prompts, 0)
    return config.model_copy(update={"prompts_uri": found.uri})


def _check_count(found: Prompts, num_prompts: int, of_validation: int) -> None:
    """Raises BadRequest where there are fewer captions than the evaluation and validation need."""
    if found.count < num_prompts + of_validation:
        param = "evaluation.num_prompts" if num_prompts else "validation.num_prompts"
        needs = f"{num_prompts} and validation {of_validation}" if num_prompts and of_validation else None
        message = (
            f"{param}: requires {needs or num_prompts or of_validation} prompts, the {found.pairs} held-out "
            f"pairs of dataset {found.dataset} have {found.count} captions: hold out more pairs"
        )
        raise BadRequest(message, param=param, code="too_few_prompts")


def _trainings(session: Session, record: ModelRecord) -> Iterator[Job]:
    """The jobs that trained the model, and those that it was aligned from, as far as they exist."""
    trained: ModelRecord | None = record
    while trained is not None and trained.job is not None:
        job = session.scalar(select(Job).where(Job.id == trained.job))
        if job is None:
            return
        yield job
        trained = ModelRecord(**job.inputs["model"])


def _refuse_trained(record: ModelRecord, job: Job, dataset: Dataset, num_pairs: int, param: str) -> None:
    """Raises BadRequest if the job trained on captions that these pairs hold out."""
    held_out = job.request["training"]["held_out_pairs"]
    if job.inputs["dataset"]["digest"] == dataset.digest and held_out < num_pairs:
        message = (
            f"{param}: model {record.name} was trained on captions of dataset {dataset.id}: "
            f"job {job.id} held out {held_out} pairs of it, got {num_pairs}"
        )
        raise BadRequest(message, param=param, code="trained_on_prompts")


def _refuse_drawn(record: ModelRecord, job: Job, found: Prompts, param: str) -> None:
    """Raises BadRequest if the job drew its pairs for one of the captions, or if nobody can tell."""
    uri = job.request["rollouts"]["prompts_uri"]
    num_prompts = job.request["rollouts"]["num_prompts"]
    drawn = making.unchanged_prompts(uri, num_prompts, job.inputs["prompts_digest"])
    why = f"{uri!r} has changed since"
    if drawn is not None:
        shared = {prompt.text for prompt in drawn} & {prompt.text for prompt in all_prompts(found.uri)}
        if not shared:
            return
        why = f"{len(shared)} of them are among the {found.count} captions, such as {min(shared)!r}"
    message = f"{param}: model {record.name} was trained by job {job.id} on prompts of its rollouts: {why}"
    raise BadRequest(message, param=param, code="trained_on_prompts")
