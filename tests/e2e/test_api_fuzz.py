"""Thousands of generated requests, valid and invalid, alone and in sequences: the API keeps what its OpenAPI
document promises. Most requests name what exists.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dde_core.config import SampleConfig, TrainConfig
from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from services.api.requests import (
    AlignmentJobCreate,
    EvaluationConfig,
    EvaluationCreate,
    KeyCreate,
    StudyCreate,
    StudyEvaluation,
)
from services.client.api import Client
from services.client.local import LocalSystem
from services.client.processes import wait_until
from tests.support.pairs_file import pair_rows, write_pairs

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("schemathesis.toml")
HOOKS = "tests.support.schemathesis_hooks"
EXAMPLES = 60
JOB = "/v1/alignment/jobs/{job_id}"
NAMED = (
    *("/v1/models/{model_id}", "/v1/datasets/{dataset_id}", "/v1/evaluations/{evaluation_id}", JOB),
    "/v1/scorers/{scorer_id}",
    *(f"/v1/studies/{{study_id}}{part}" for part in ("", "/events", "/report", "/report.json")),
    *(f"{JOB}/{part}" for part in ("events", "metrics", "checkpoints", "credit")),
)
"""Paths that must have succeeded with the id of something that exists."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_schemathesis_finds_nothing_with_every_check(tmp_path: Path):
    pairs = write_pairs(tmp_path / "pairs.parquet", pair_rows(12)).as_uri()
    successes = tmp_path / "successes"
    with LocalSystem(tmp_path / "state", fresh=True, allow=[str(tmp_path)]) as system:
        with system.client() as client:
            ids = real_ids(client, pairs)
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "--no-color", "run"),
            f"{system.url}/openapi.json",
            *("--header", f"Authorization: Bearer {system.key}"),
            *("--checks", "all", "--phases", "examples,coverage,fuzzing,stateful"),
            *("--max-examples", str(EXAMPLES), "--continue-on-failure", "--request-timeout", "60"),
        ]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        uris = {"/v1/datasets": pairs, "/v1/datasets/validate": pairs, "/v1/models": MODEL_DIR.as_uri()}
        env = {
            **os.environ,
            "SCHEMATHESIS_HOOKS": HOOKS,
            "PYTHONPATH": path,
            "REAL_IDS": json.dumps(ids),
            "REAL_FILES": json.dumps(uris),
            "SUCCESSES": str(successes),
        }
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    print(done.stdout[done.stdout.rfind("SUMMARY") :])
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    succeeded = set(successes.read_text().splitlines())
    assert succeeded >= {
        *(f"GET {path}" for path in NAMED),
        *("POST /v1/datasets", "POST /v1/datasets/validate", "POST /v1/models", "POST /v1/keys"),
    }


def real_ids(client: Client, pairs: str) -> dict[str, str]:
    """One of everything, by the path parameter that names it. The job has succeeded."""
    client.create_model("shapes", MODEL_DIR.as_uri())
    dataset = client.create_dataset("pairs", pairs).id
    evaluation = EvaluationConfig(
        prompts_uri=PROMPTS_FILE.as_uri(), num_prompts=2, sample=SampleConfig(steps=1)
    )
    job = client.create_job(
        AlignmentJobCreate(
            model="shapes",
            dataset=dataset,
            training=TrainConfig(steps=1, batch_size=4, checkpoint_every=1),
            evaluation=evaluation,
        )
    )
    assert client.wait(job.id, timeout_s=600).status == "succeeded"
    compared = EvaluationCreate(models=["shapes", job.name], base="shapes", **dict(evaluation))
    evaluated = client.create_evaluation(compared).id
    assert client.wait_evaluation(evaluated, timeout_s=300).status == "succeeded"
    study = client.create_study(
        StudyCreate(
            name="tiny",
            base={
                "model": "shapes",
                "dataset": dataset,
                "training": {"steps": 1, "batch_size": 4},
                "evaluation": evaluation.model_dump(mode="json"),
            },
            grid={"training.seed, training.draw_seed": [0]},
            evaluation=StudyEvaluation(**dict(evaluation)),
        )
    )
    wait_until(lambda: client.study(study.id).finished, "the study has no end", [], 600)
    assert client.study(study.id).status == "succeeded"
    return {
        "model_id": "shapes",
        "dataset_id": dataset,
        "job_id": job.id,
        "evaluation_id": evaluated,
        "scorer_id": "match",
        "study_id": study.id,
        "key_id": client.create_key(KeyCreate(name="fuzz")).id,
    }
