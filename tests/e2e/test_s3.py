"""Every stage runs on an object store that sometimes returns 503, cuts a download or loses an upload."""

from __future__ import annotations

from pathlib import Path

import pytest

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.shapes import MODEL_DIR
from services.api.records import ModelRecord
from services.artifacts import checkpoints, models
from services.client.processes import environment
from services.stages.specs import LedgerSpec, TrainSpec
from services.storage import files
from tests.support.s3_server import BUCKET, Fault, S3Server, random_fraction
from tests.support.stage_runs import StageRuns, shapes_record
from tests.support.synthetic_pairs import synthetic_rows, write_stream

STEPS = 6
OBJECTIVE = ObjectiveConfig(method="dde", beta=500.0, calibration_bins=50)
TRAINING = TrainConfig(
    steps=STEPS, batch_size=16, checkpoint_every=2, reference="ledger", draws=1, held_out_pairs=20
)
FAULTS = (
    Fault("slow_down", random_fraction(0.05, seed=0)),
    Fault("cut_download", random_fraction(0.03, seed=1), method="GET"),
    Fault("cut_upload", random_fraction(0.03, seed=2), method="PUT"),
    Fault("lose_response", random_fraction(0.02, seed=3)),
)


@pytest.fixture
def model(s3_server: S3Server) -> ModelRecord:
    """The shipped model, copied to the object store."""
    uri = f"s3://{BUCKET}/models/shapes"
    files.copy_folder(MODEL_DIR.as_uri(), uri)
    return shapes_record().model_copy(update={"uri": uri, "digest": models.folder_digest(uri)})


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_pairs_become_a_model_in_an_object_store_that_fails_now_and_then(
    s3_server: S3Server, model: ModelRecord, tmp_path: Path
):
    file = write_stream(tmp_path / "pairs.parquet", synthetic_rows(200), row_group_size=50)
    pairs = f"s3://{BUCKET}/pairs.parquet"
    files.upload(file, pairs)
    runs = StageRuns(f"s3://{BUCKET}/runs", environment(str(tmp_path), s3_server.env))
    s3_server.inject(*FAULTS)

    encoded = runs.start("encode", runs.encode_spec("encode", pairs, model)).finish()
    assert encoded.counts["pairs"] == 200
    run = {"dataset": encoded.dataset, "model": model, "objective": OBJECTIVE, "training": TRAINING}
    ledger = runs.start("ledger", LedgerSpec(**runs.frame("ledger"), **run)).finish()
    assert (ledger.draws, ledger.pairs) == (1, 200)
    output = runs.prefix("model")
    spec = TrainSpec(
        **runs.frame("train"),
        **run,
        ledger=ledger.ledger,
        model_id="model_s3",
        name="aligned",
        workers=1,
        run=runs.prefix("run"),
        output=output,
    )
    trained = runs.start("train", spec).finish()
    print(f"faults injected: {dict(s3_server.counts)}; training ended with {trained.metrics}")
    assert trained.step == STEPS
    assert trained.model.digest == models.folder_digest(output), (
        "the stored model is the one that was trained"
    )
    assert checkpoints.steps(runs.prefix("run"))[-1] == STEPS
    assert all(
        s3_server.counts[kind] for kind in ("slow_down", "cut_download", "cut_upload", "lose_response")
    ), s3_server.counts
    s3_server.inject()

    on_disk = StageRuns(tmp_path / "disk", runs.env)
    undisturbed = on_disk.start("encode", on_disk.encode_spec("encode", file.as_uri(), model)).finish()
    assert undisturbed.digest == encoded.digest, "the same pairs on a disk make the same dataset"
