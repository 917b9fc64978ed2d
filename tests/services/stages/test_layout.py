"""Paths in storage are an interface: a later version finds the files of an earlier one."""

from __future__ import annotations

import pytest

from services.errors import BadRequest
from services.stages import layout

ROOT = "s3://bucket/root"
PREFIX = f"{ROOT}/jobs/ajob_1/train/a2"
RUN = f"{ROOT}/jobs/ajob_1/train/run"
DATASET = f"{ROOT}/datasets/key"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (layout.attempt_prefix(ROOT, "ajob_1", "train", 2), PREFIX),
        (layout.spec_uri(PREFIX), f"{PREFIX}/spec.json"),
        (layout.journal_uri(PREFIX, 7), f"{PREFIX}/journal/00000007.json"),
        (layout.done_uri(PREFIX), f"{PREFIX}/done.json"),
        (layout.failed_uri(PREFIX), f"{PREFIX}/failed.json"),
        (layout.stopped_uri(PREFIX), f"{PREFIX}/stopped.json"),
        (layout.stop_uri(PREFIX), f"{PREFIX}/stop.json"),
        (layout.stop_ack_uri(PREFIX), f"{PREFIX}/stopping.json"),
        (layout.worker_failed_uri(PREFIX), f"{PREFIX}/worker-failed.json"),
        (layout.worker_error_uri(PREFIX, 3), f"{PREFIX}/worker-error-3.json"),
        (layout.report_uri(PREFIX), f"{PREFIX}/report.json"),
        (layout.grid_uri(PREFIX), f"{PREFIX}/grid.png"),
        (layout.run_folder(ROOT, "ajob_1"), RUN),
        (layout.checkpoint_folder(RUN, 50), f"{RUN}/checkpoints/step-00000050"),
        (layout.checkpoint_record_uri(RUN, 50), f"{RUN}/checkpoints/step-00000050/checkpoint.json"),
        (layout.broken_checkpoint_uri(RUN, 50), f"{RUN}/checkpoints/step-00000050/broken.json"),
        (layout.outcome_uri(RUN, 50), f"{RUN}/validation/step-00000050.json"),
        (layout.outcome_image_uri(RUN, 50), f"{RUN}/validation/step-00000050.png"),
        (layout.pair_log_folder(RUN), f"{RUN}/pairs"),
        (layout.tensorboard_folder(RUN), f"{RUN}/tensorboard"),
        (layout.wandb_folder(RUN), f"{RUN}/wandb"),
        (layout.fence_uri(RUN), f"{RUN}/fence.json"),
        (layout.reference_uri(RUN), f"{RUN}/reference.json"),
        (layout.dataset_folder(layout.datasets_folder(ROOT), "key"), DATASET),
        (layout.manifest_uri(DATASET), f"{DATASET}/manifest.json"),
        (layout.quarantine_uri(DATASET), f"{DATASET}/quarantine.jsonl"),
        (layout.block_uri(DATASET, 12), f"{DATASET}/blocks/00000012.parquet"),
        (layout.bad_images_uri(DATASET, 12), f"{DATASET}/bad/00000012.json"),
        (layout.ledger_folder(DATASET, "ledger-key"), f"{DATASET}/ledgers/ledger-key"),
        (layout.model_record_uri(ROOT, "model_1"), f"{ROOT}/models/model_1.json"),
        (layout.model_folder(ROOT, "model_1"), f"{ROOT}/models/model_1"),
        (layout.alias_uri(ROOT, "aligned"), f"{ROOT}/aliases/aligned.json"),
        (layout.credit_uri(f"{ROOT}/models/model_1"), f"{ROOT}/models/model_1/credit.json"),
    ],
)
def test_every_path_is_that_of_earlier_versions(found: str, expected: str) -> None:
    assert found == expected


def test_the_default_project_keeps_its_paths_and_any_other_has_a_folder_of_its_own() -> None:
    assert layout.project_root(ROOT, "default") == ROOT
    assert layout.project_root(ROOT, "team-a") == f"{ROOT}/projects/team-a"


@pytest.mark.parametrize("name", ["", "..", "a/b", "Team", "a\n", "-a", "a" * 64])
def test_a_text_that_names_no_project_has_no_root(name: str) -> None:
    with pytest.raises(BadRequest, match=r"^project: "):
        layout.project_root(ROOT, name)


def test_other_projects_files_are_all_of_the_storage_but_the_projects_own_folder() -> None:
    assert layout.others_root(ROOT, "default") == (f"{ROOT}/projects", None)
    assert layout.others_root(ROOT, "team-a") == (ROOT, f"{ROOT}/projects/team-a")


@pytest.mark.parametrize("number", [0, 7, 10**9])
def test_a_number_is_read_back_from_its_name(number: int) -> None:
    below = f"{layout.checkpoints_folder(RUN)}/"
    assert layout.checkpoint_step(layout.checkpoint_record_uri(RUN, number).removeprefix(below)) == number
    assert layout.outcome_step(layout.outcome_uri(RUN, number).rpartition("/")[2]) == number
    assert layout.block_number(layout.block_uri(DATASET, number).rpartition("/")[2]) == number
    assert layout.block_number(layout.bad_images_uri(DATASET, number).rpartition("/")[2]) == number


@pytest.mark.parametrize(
    "name", ["notes.json", "step-00000050.png", "step-x.json", "step-00000050/broken.json"]
)
def test_other_files_have_no_step(name: str) -> None:
    assert layout.checkpoint_step(name) is None
    assert layout.outcome_step(name) is None
    assert layout.block_number(name) is None


def test_the_prefixes_of_earlier_attempts_follow_from_the_last_one() -> None:
    stage = f"{ROOT}/jobs/ajob_1/train"
    assert layout.attempts_up_to(f"{stage}/a3", 3) == [f"{stage}/a1", f"{stage}/a2", f"{stage}/a3"]
    assert layout.attempts_up_to(f"{stage}/a2/", 2) == [f"{stage}/a1", f"{stage}/a2"]
    assert layout.attempts_up_to("/elsewhere/by-hand", 3) == ["/elsewhere/by-hand"]
