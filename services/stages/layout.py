"""Every path and marker name in storage. Other modules call these functions and build or parse no paths.

A job is a chain of stages. A stage is one Ray job that reads a spec file and ends by writing a marker file.

Everything below {root} exists once a project: {root} is the storage URI for the default project, and
projects/{project}/ in it for any other.

    {root}/jobs/{job}/{stage}/a{attempt}/                    the prefix of one attempt
        spec.json                   written by the control plane, read by the stage
        started.json                the process that runs the attempt; only one may
        driver.log                  the end of its output
        journal/{number}.json       append-only events and metrics, written by the stage
        done.json                   marker: the stage's result
        failed.json                 marker: why it failed
        stopped.json                marker: the step after which it stopped on request
        stop.json                   a request to stop, written by the control plane, read only by train
        stopping.json               a worker has received that request
        worker-failed.json          an error that ends the run
        worker-error-{rank}.json    how often a worker failed with the same unexpected error
        report.json, report.html, grid.png    the report of evaluate, as data, page and image grid
    {root}/jobs/{job}/train/run/                             the run that all attempts of train share
        checkpoints/step-{step}/    committed by checkpoint.json (services/artifacts/checkpoints.py)
        validation/step-{step}.json validation's metrics of that checkpoint; the .png has its images
        tensorboard/, wandb/        files of the trackers
        pairs/*.parquet             t, margin and gradient weight of every pair of every step
        fence.json                  the attempt and the group of workers that may write
        reference.json              the ledger that the run started with
        rounds/{round}/             the pairs that an on-policy run has drawn, committed by round.json
    {root}/studies/{study}/report.json, report.html          the report of a study
    {root}/datasets/{key}/                                   one encoded dataset
        manifest.json               commits the dataset: names the latent shards, written last
        quarantine.jsonl            rows that cannot be used
        blocks/, bad/               encoded blocks, until they are joined into shards
        ledgers/{key}/ledger-*.json commits a ledger: errors of a frozen model on the shards, written last
    {root}/pairs/{dataset}/                                  the pairs of a dataset that scorers made
        pairs/*.parquet             what the dataset's URI names
        record.json                 commits them: the stage's result
        scored/*.parquet            images with their scores, until they are paired
    {root}/prompts/{dataset}-held-out-{pairs}-{key}.jsonl    captions that so many pairs hold out of training
    {root}/prompts/{dataset}-captions.jsonl                  all captions, as prompts of rollouts
    {root}/images/{model}/                                   images of a model, by its digest
        {key}.parquet               a chunk of images, by everything that determines them
        {key}-{scorer}.parquet      the scores of that chunk
    {root}/images/external/                                  the same of images that were drawn elsewhere
    {root}/generated/{expires}-{file}                        images of requests, by URL until they expire
    {root}/models/{model}.json, {root}/aliases/{name}.json   models for Serve, written by the control plane
    {root}/scorers/{name}.json                               scorers for Serve, written by the control plane
    {root}/models/{model}/                                   weights of an aligned model: a diffusers folder
        credit.json                 where its training put the credit

Imports no torch and no Ray.
"""

from __future__ import annotations

import re

from dde_core.latents.schema import MANIFEST
from services.api.requests import DEFAULT_PROJECT, PROJECT_PATTERN
from services.errors import BadRequest
from services.storage import files

CREDIT = "credit.json"
CHECKPOINT_RECORD = "checkpoint.json"
PROJECTS = "projects"
_STEP = re.compile(r"step-(\d+)")
_BLOCK = re.compile(r"(\d{8,})\.(parquet|json)")


def project_root(storage: str, project: str) -> str:
    """The root of a project's files in the storage URI. Raises BadRequest for a text that names none."""
    if not re.fullmatch(PROJECT_PATTERN, project) or project.endswith("\n"):
        raise BadRequest(f"project: must match {PROJECT_PATTERN}, got {project!r}", param="project")
    return storage if project == DEFAULT_PROJECT else files.join(storage, PROJECTS, project)


def others_root(storage: str, project: str) -> tuple[str, str | None]:
    """Where other projects' files are in the storage URI, and which part of that is the project's own."""
    if project == DEFAULT_PROJECT:
        return files.join(storage, PROJECTS), None
    return storage, project_root(storage, project)


def job_folder(root: str, job: str) -> str:
    """The folder of everything that a job wrote, but its model and what jobs share."""
    return files.join(root, "jobs", job)


def attempt_prefix(root: str, job: str, stage: str, attempt: int) -> str:
    """The folder of one attempt of a job's stage."""
    return files.join(job_folder(root, job), stage, _attempt_name(attempt))


def attempts_up_to(prefix: str, attempt: int) -> list[str]:
    """The prefixes of attempts 1 to ``attempt``, from the prefix of the last one.

    A prefix that does not end in the attempt's name is returned alone.
    """
    folder, _, name = prefix.rstrip("/").rpartition("/")
    if name != _attempt_name(attempt):
        return [prefix]
    return [files.join(folder, _attempt_name(number)) for number in range(1, attempt + 1)]


def _attempt_name(attempt: int) -> str:
    return f"a{attempt}"


# ---- one attempt


def spec_uri(prefix: str) -> str:
    """The spec of an attempt."""
    return files.join(prefix, "spec.json")


def started_uri(prefix: str) -> str:
    """Names the process that runs an attempt. It is created once, before the stage works."""
    return files.join(prefix, "started.json")


def driver_log_uri(prefix: str) -> str:
    """The end of the output of an attempt's driver."""
    return files.join(prefix, "driver.log")


def journal_folder(prefix: str) -> str:
    """The folder of an attempt's journal files."""
    return files.join(prefix, "journal")


def journal_uri(prefix: str, number: int) -> str:
    """Journal file ``number`` of an attempt, counted from 0 without gaps."""
    return files.join(journal_folder(prefix), f"{number:08d}.json")


def done_uri(prefix: str) -> str:
    """The marker of success: the stage's result."""
    return files.join(prefix, "done.json")


def failed_uri(prefix: str) -> str:
    """The marker of failure: a StageFailure."""
    return files.join(prefix, "failed.json")


def stopped_uri(prefix: str) -> str:
    """The marker of a stop on request: a StageStopped."""
    return files.join(prefix, "stopped.json")


def stop_uri(prefix: str) -> str:
    """The request to stop: a StopRequest."""
    return files.join(prefix, "stop.json")


def stop_ack_uri(prefix: str) -> str:
    """Exists once a worker has received the request to stop."""
    return files.join(prefix, "stopping.json")


def worker_failed_uri(prefix: str) -> str:
    """The StageFailure of a worker whose error a retry would repeat."""
    return files.join(prefix, "worker-failed.json")


def worker_error_uri(prefix: str, rank: int) -> str:
    """How often worker ``rank`` has failed with the same unexpected error."""
    return files.join(prefix, f"worker-error-{rank}.json")


def report_uri(output: str) -> str:
    """The report of an evaluation."""
    return files.join(output, "report.json")


def page_uri(output: str) -> str:
    """The report of an evaluation as a page."""
    return files.join(output, "report.html")


def grid_uri(output: str) -> str:
    """The image grid of an evaluation."""
    return files.join(output, "grid.png")


# ---- a study


def study_report_uri(root: str, study: str) -> str:
    """The report of a study for programs."""
    return files.join(root, "studies", study, "report.json")


def study_page_uri(root: str, study: str) -> str:
    """The report of a study for people."""
    return files.join(root, "studies", study, "report.html")


# ---- a training run


def run_folder(root: str, job: str) -> str:
    """The run folder, which all attempts of the train stage share."""
    return files.join(root, "jobs", job, "train", "run")


def checkpoints_folder(run: str) -> str:
    """The folder of a run's checkpoints."""
    return files.join(run, "checkpoints")


def checkpoint_folder(run: str, step: int) -> str:
    """The checkpoint after ``step`` steps."""
    return files.join(checkpoints_folder(run), _step_name(step))


def checkpoint_record_uri(run: str, step: int) -> str:
    """The record that commits the checkpoint after ``step`` steps."""
    return files.join(checkpoint_folder(run, step), CHECKPOINT_RECORD)


def broken_checkpoint_uri(run: str, step: int) -> str:
    """The record of a checkpoint that was invalidated."""
    return files.join(checkpoint_folder(run, step), "broken.json")


def checkpoint_step(name: str) -> int | None:
    """The step of a checkpoint, from its record's path in ``checkpoints_folder``; None for any other file."""
    folder, _, file = name.partition("/")
    return _step_of(folder) if file == CHECKPOINT_RECORD else None


def rounds_folder(run: str) -> str:
    """The folder of all rounds of a run."""
    return files.join(run, "rounds")


def round_folder(run: str, round: int) -> str:
    """The folder of one round, counted from 0."""
    return files.join(rounds_folder(run), f"{round:08d}")


def round_file_uri(run: str, round: int, name: str) -> str:
    """A file of a round's pairs."""
    return files.join(round_folder(run, round), name)


def round_record_uri(run: str, round: int) -> str:
    """The record that commits a round."""
    return files.join(round_folder(run, round), "round.json")


def round_number(name: str) -> int | None:
    """The round of a file, from its name relative to ``rounds_folder``; None for any other file."""
    folder = name.partition("/")[0]
    return int(folder) if re.fullmatch(r"\d{8}", folder) else None


def validation_folder(run: str) -> str:
    """The folder of validation outcomes."""
    return files.join(run, "validation")


def outcome_uri(run: str, step: int) -> str:
    """The validation outcome of the model after ``step`` steps: a Validated."""
    return files.join(validation_folder(run), f"{_step_name(step)}.json")


def outcome_image_uri(run: str, step: int) -> str:
    """The image grid of the model after ``step`` steps, generated by validation."""
    return files.join(validation_folder(run), f"{_step_name(step)}.png")


def outcome_step(name: str) -> int | None:
    """The step of an outcome, from its file name in ``validation_folder``; None for any other file."""
    return _step_of(name.removesuffix(".json")) if name.endswith(".json") else None


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(name: str) -> int | None:
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def pair_log_folder(run: str) -> str:
    """The folder of a run's pair log."""
    return files.join(run, "pairs")


def tensorboard_folder(run: str) -> str:
    """The folder of TensorBoard's event files."""
    return files.join(run, "tensorboard")


def wandb_folder(run: str) -> str:
    """The folder of Weights & Biases' offline files, for `wandb sync`."""
    return files.join(run, "wandb")


def fence_uri(run: str) -> str:
    """The attempt and the group of workers that may write into the run's folder."""
    return files.join(run, "fence.json")


def reference_uri(run: str) -> str:
    """The URI of the ledger that the run started with, or null."""
    return files.join(run, "reference.json")


# ---- datasets and their ledgers


def datasets_folder(root: str) -> str:
    """The folder of all encoded datasets."""
    return files.join(root, "datasets")


def dataset_folder(datasets: str, key: str) -> str:
    """One encoded dataset."""
    return files.join(datasets, key)


def manifest_uri(dataset: str) -> str:
    """The manifest that commits an encoded dataset."""
    return files.join(dataset, MANIFEST)


def quarantine_uri(dataset: str) -> str:
    """The rows that could not be used, one JSON object a line."""
    return files.join(dataset, "quarantine.jsonl")


def blocks_folder(dataset: str) -> str:
    """The folder of encoded blocks that are not joined into shards yet."""
    return files.join(dataset, "blocks")


def block_uri(dataset: str, number: int) -> str:
    """One encoded block."""
    return files.join(blocks_folder(dataset), f"{number:08d}.parquet")


def bad_images_folder(dataset: str) -> str:
    """The folder of the blocks' unusable images."""
    return files.join(dataset, "bad")


def bad_images_uri(dataset: str, number: int) -> str:
    """Why images of one block cannot be used, by their slot in the block."""
    return files.join(bad_images_folder(dataset), f"{number:08d}.json")


def block_number(name: str) -> int | None:
    """The number of a block, from its file name in either of its folders; None for any other file."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else None


def ledgers_folder(dataset: str) -> str:
    """The folder of all ledgers of a dataset."""
    return files.join(dataset, "ledgers")


def ledger_folder(dataset: str, key: str) -> str:
    """The ledger whose key has the name ``key``."""
    return files.join(ledgers_folder(dataset), key)


# ---- datasets that scorers made


def all_made_folder(root: str) -> str:
    """The folder of all datasets that scorers made."""
    return files.join(root, "pairs")


def made_folder(root: str, dataset: str) -> str:
    """The files of the dataset with this id."""
    return files.join(all_made_folder(root), dataset)


def made_pairs_folder(made: str) -> str:
    """The folder of the dataset's pairs: its URI."""
    return files.join(made, "pairs")


def made_pairs_uri(made: str, number: int) -> str:
    """The pairs of chunk ``number``."""
    return files.join(made_pairs_folder(made), f"{number:08d}.parquet")


def made_record_uri(made: str) -> str:
    """The record that commits the pairs: a PairsResult."""
    return files.join(made, "record.json")


def scored_folder(made: str) -> str:
    """The folder of scored images that are not paired yet."""
    return files.join(made, "scored")


def scored_uri(made: str, number: int) -> str:
    """The scored images of chunk ``number``."""
    return files.join(scored_folder(made), f"{number:08d}.parquet")


def scored_number(name: str) -> int | None:
    """The number of a chunk, from its file name in ``scored_folder``; None for any other file."""
    return block_number(name) if name.endswith(".parquet") else None


# ---- captions as prompts


def prompts_folder(root: str) -> str:
    """The folder of files of prompts that were made of datasets."""
    return files.join(root, "prompts")


def held_out_uri(root: str, dataset: str, num_pairs: int, key: str) -> str:
    """Captions of a dataset that are not trained on if ``num_pairs`` are held out, by a ``key`` of them."""
    return files.join(prompts_folder(root), f"{dataset}-held-out-{num_pairs}-{key[:16]}.jsonl")


def captions_uri(root: str, dataset: str) -> str:
    """All captions of a dataset, each once."""
    return files.join(prompts_folder(root), f"{dataset}-captions.jsonl")


# ---- images of evaluations


def images_folder(root: str) -> str:
    """The folder of all images that evaluations have drawn."""
    return files.join(root, "images")


def images_of(images: str, model: str) -> str:
    """The images of one model, by its digest."""
    return files.join(images, model)


def external_images(images: str) -> str:
    """Copies of images that were drawn elsewhere, by their content."""
    return files.join(images, "external")


def images_uri(folder: str, key: str) -> str:
    """A chunk of images."""
    return files.join(folder, f"{key}.parquet")


def scores_uri(folder: str, key: str, scorer: str) -> str:
    """The scores of a chunk of images by the scorer whose key is ``scorer``."""
    return files.join(folder, f"{key}-{scorer}.parquet")


# ---- images of requests


def generated_folder(root: str) -> str:
    """The folder of all images that can be fetched by URL."""
    return files.join(root, "generated")


def generated_uri(root: str, expires: int, name: str) -> str:
    """An image that can be fetched until ``expires`` (Unix time in seconds)."""
    return files.join(generated_folder(root), f"{expires:010d}-{name}")


def generated_expiry(name: str) -> int | None:
    """When an image expires, from its file name in ``generated_folder``; None for any other file."""
    expires, dash, _ = name.partition("-")
    return int(expires) if dash and re.fullmatch(r"[0-9]{10,}", expires) else None


# ---- models


def model_record_uri(root: str, model_id: str) -> str:
    """The record of a model that Serve can load."""
    return files.join(root, "models", f"{model_id}.json")


def model_folder(root: str, model_id: str) -> str:
    """The weights of an aligned model."""
    return files.join(root, "models", model_id)


def alias_uri(root: str, name: str) -> str:
    """The id of the model that a name refers to."""
    return files.join(root, "aliases", f"{name}.json")


def credit_uri(model_folder: str) -> str:
    """The credit record of an aligned model."""
    return files.join(model_folder, CREDIT)


# ---- scorers


def scorer_record_uri(root: str, name: str) -> str:
    """The record of a registered scorer that Serve can load."""
    return files.join(root, "scorers", f"{name}.json")
