"""The main path over HTTP on real Ray and Serve: pairs in, an aligned, evaluated and served model out."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from services.api.answers import JobView
from services.api.images import ImageRequest
from services.api.requests import AlignmentJobCreate, EvaluationConfig, EvaluationCreate, ValidationConfig
from services.artifacts import models
from services.client.api import ApiError, Client
from services.client.local import LocalSystem
from services.storage import files
from tests.support.pairs_file import pair_rows, write_pairs
from tests.support.weights import WEIGHTS

pytestmark = pytest.mark.timeout(900)
STEPS = 12


@pytest.fixture(scope="module")
def base(client: Client) -> str:
    return client.create_model("shapes", MODEL_DIR.as_uri()).name


@pytest.fixture(scope="module")
def dataset(client: Client, pairs_file: Path) -> str:
    return client.create_dataset("scenes", pairs_file.as_uri()).id


def job_request(base: str, dataset: str, **changes) -> AlignmentJobCreate:
    fields = {
        "model": base,
        "dataset": dataset,
        "objective": ObjectiveConfig(beta=2000.0, calibration_bins=50),
        "training": TrainConfig(steps=STEPS, batch_size=32, learning_rate=1e-4, checkpoint_every=6),
        "workers": 2,
        "evaluation": EvaluationConfig(
            prompts_uri=PROMPTS_FILE.as_uri(),
            num_prompts=20,
            sample=SampleConfig(steps=5, guidance_scale=3.0),
        ),
    }
    return AlignmentJobCreate(**{**fields, **changes})


@pytest.fixture(scope="module")
def finished(client: Client, base: str, dataset: str) -> JobView:
    """One job that has ended, with two validations during training."""
    training = TrainConfig(
        steps=STEPS, batch_size=32, learning_rate=1e-4, checkpoint_every=6, held_out_pairs=20
    )
    validation = ValidationConfig(every=6, num_prompts=4, best_metric="held_out_margin")
    request = job_request(base, dataset, name="aligned", training=training, validation=validation)
    return client.wait(client.create_job(request).id, timeout_s=600)


def test_a_posted_job_ends_as_an_aligned_and_evaluated_model(finished: JobView):
    assert finished.status == "succeeded", finished.reason
    assert finished.result.encode.counts == {
        "rows": 200, "pairs": 179, "ties": 20, "missing": 0, "bad": 1, "duplicates": 0, "images": 359,
        "soft": 0, "contradicting": 0, "long_captions": 0, "transparent": 0,
    }  # fmt: skip
    assert set(finished.result.evaluate.scores) == {"match", "taste", "fidelity"}
    assert all(finished.stage_seconds[stage] > 0 for stage in ("encode", "train", "evaluate"))


def test_a_broken_image_is_quarantined_with_its_row(finished: JobView):
    lines = (
        files.read_bytes(files.join(finished.result.encode.dataset, "quarantine.jsonl")).decode().splitlines()
    )
    (line,) = map(json.loads, lines)
    assert (line["row"], line["cause"], line["pictures"]) == (
        ":0:3",
        "image_not_an_image",
        {"0-3-0": "image_not_an_image"},
    )


def test_every_step_reports_finite_metrics_of_winner_and_loser(client: Client, finished: JobView):
    rows = [row for row in client.metrics(finished.id, "train") if row.step > 0]
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    for name in (
        "loss",
        "implicit_accuracy",
        "winner_error_diff",
        "loser_error_diff",
        "gradient_weight",
        "pairs_per_s",
    ):
        assert all(np.isfinite(row.metrics[name]) for row in rows), name
    assert rows[0].metrics["loss"] == pytest.approx(np.log(2), abs=1e-6), (
        "policy and reference begin as the same model"
    )
    assert rows[-1].metrics["winner_error_diff"] != 0.0


def test_checkpoints_are_validated_and_the_best_one_becomes_the_model(client: Client, finished: JobView):
    found = list(client.checkpoints(finished.id))
    assert [each.step for each in found] == [6, STEPS]
    margins = {each.step: each.validation.metrics["held_out_margin"] for each in found}
    best = max(margins, key=margins.get)
    assert (finished.result.train.step, finished.result.train.metrics["held_out_margin"]) == (
        best,
        margins[best],
    )
    rows = {row.step: row.metrics for row in client.metrics(finished.id, "train")}
    for step in (0, 6, STEPS):
        assert rows[step]["held_out_pairs"] == 20
        assert 0 < rows[step]["taste"] < 1
        run = files.join(finished.result.encode.dataset, *[".."] * 2, "jobs", finished.id, "train", "run")
        sheet = Image.open(
            io.BytesIO(files.read_bytes(files.join(run, "validation", f"step-{step:08d}.png")))
        )
        assert min(sheet.size) > 100
    assert rows[0]["held_out_accuracy"] == 0.5, "the base has no margin"
    assert files.list_files(files.join(run, "tensorboard"), recursive=True)


def test_the_model_records_its_lineage(client: Client, base: str, finished: JobView):
    model = client.model(finished.aligned_model)
    assert model.lineage["base_digest"] == client.model(base).digest
    assert model.lineage["objective"]["noise"] == "independent"
    assert model.digest == models.folder_digest(model.uri)
    names = files.list_files(model.uri, recursive=True)
    assert {"README.md", "lineage.json", "model_index.json", f"unet/{WEIGHTS}"} <= set(names)
    assert not [name for name in names if name.endswith((".pt", ".pkl", ".bin"))]


def test_events_report_the_transitions_in_order(client: Client, finished: JobView):
    messages = [event.message for event in client.events(finished.id)]
    moves = [message.split(":")[0] for message in messages if " -> " in message]
    assert moves == [
        "validating -> queued",
        "queued -> preparing",
        "preparing -> running",
        "running -> evaluating",
        "evaluating -> succeeded",
    ]


def test_serve_generates_from_the_aligned_model_by_name_without_being_redeployed(
    client: Client, finished: JobView
):
    def draw(model: str, seed: int) -> np.ndarray:
        wanted = ImageRequest(
            model=model, prompt="a large red circle", seed=seed, steps=5, guidance_scale=3.0
        )
        return np.asarray(Image.open(io.BytesIO(client.generate(wanted).data[0].content)))

    aligned, base = draw("aligned", 0), draw("shapes", 0)
    assert aligned.shape == (32, 32, 3)
    assert (draw("aligned", 0) == aligned).all(), "an image is a function of prompt and seed"
    assert (aligned != base).any(), "the aligned model is not the base"
    assert (draw("aligned", 1) != aligned).any()


def test_the_report_holds_every_prompt_and_its_grid_is_an_image(finished: JobView):
    report = files.read_json(finished.result.evaluate.report)
    assert len(report["prompts"]) == 20
    taste = report["scores"]["taste"][report["models"].index("aligned")]
    assert finished.result.evaluate.scores["taste"]["aligned"].candidate == pytest.approx(np.mean(taste))
    page = files.read_bytes(finished.result.evaluate.page).decode()
    assert finished.result.evaluate.summary[0] in page
    grid = Image.open(io.BytesIO(files.read_bytes(finished.result.evaluate.grid)))
    assert grid.format == "PNG"
    assert min(grid.size) > 100


def test_diffusers_alone_loads_the_aligned_model(client: Client, finished: JobView):
    folder = files.resolve(client.model(finished.aligned_model).uri)[1]
    code = (
        "import sys; from diffusers import StableDiffusionPipeline as P; p = P.from_pretrained(sys.argv[1]);"
        "p.set_progress_bar_config(disable=True);"
        "print(p('a red circle', num_inference_steps=2).images[0].size);"
        "assert not {'services', 'dde_core'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "(32, 32)", done.stderr


@pytest.mark.slow
def test_an_encoded_dataset_is_reused_by_the_next_job(
    client: Client, base: str, dataset: str, finished: JobView
):
    training = TrainConfig(steps=1, batch_size=32)
    again = client.wait(client.create_job(job_request(base, dataset, training=training)).id, timeout_s=240)
    assert again.status == "succeeded", again.reason
    assert again.result.encode.reused
    assert again.result.encode.digest == finished.result.encode.digest


@pytest.mark.slow
def test_a_model_can_be_evaluated_again_with_the_same_scores(client: Client, finished: JobView):
    request = EvaluationCreate(
        models=["aligned", "shapes"],
        base="shapes",
        prompts_uri=PROMPTS_FILE.as_uri(),
        num_prompts=20,
        sample=SampleConfig(steps=5, guidance_scale=3.0),
    )
    done = client.wait_evaluation(client.create_evaluation(request).id, timeout_s=240)
    assert done.status == "succeeded", done.reason
    assert done.result.scores == finished.result.evaluate.scores, (
        "the same models, prompts and seeds give the same scores"
    )
    assert done.result.images_drawn == 0, "the job's images are used again"


@pytest.mark.slow
def test_images_are_generated_without_scores_for_prompts_that_no_scorer_knows(
    client: Client, finished: JobView, tmp_path: Path
):
    prompts = tmp_path / "own.txt"
    prompts.write_text("a photo of an astronaut\nan oil painting of a lighthouse\n")
    request = EvaluationCreate(
        models=["shapes", "aligned"], prompts_uri=prompts.as_uri(), num_prompts=2, scorers=[]
    )
    done = client.wait_evaluation(client.create_evaluation(request).id, timeout_s=240)
    assert done.status == "succeeded", done.reason
    assert done.result.scores == {}
    assert Image.open(io.BytesIO(files.read_bytes(done.result.grid))).format == "PNG"


def wait_for(condition: Callable[[], object], timeout_s: float = 240.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited for {timeout_s:g} s"
        time.sleep(0.2)
    return found


def processes(system: LocalSystem, *words: str) -> list[psutil.Process]:
    """This cluster's processes whose command line holds all words."""
    found = []
    for process in psutil.Process(system.ray.child.pid).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if all(word in line for word in words):
            found.append(process)
    return found


def test_a_job_whose_driver_dies_starts_again_and_frees_its_workers_when_it_is_cancelled(
    client: Client, system: LocalSystem, base: str, dataset: str, finished: JobView
):
    training = TrainConfig(steps=5000, batch_size=32, checkpoint_every=5000)
    job = client.create_job(job_request(base, dataset, training=training, workers=1))
    wait_for(lambda: list(client.metrics(job.id, "train")))
    encoded = client.job(job.id).result.encode
    assert (encoded.reused, encoded.dataset) == (True, finished.result.encode.dataset)
    drivers = [
        each for each in processes(system, "-m services.training", job.id) if each.name().startswith("python")
    ]
    assert drivers
    for driver in drivers:
        os.kill(driver.pid, signal.SIGKILL)
    restarted = "stage train restarts as attempt 2: the driver of stage train ended without a result"
    wait_for(lambda: any(event.message.startswith(restarted) for event in client.events(job.id)))
    wait_for(lambda: processes(system, "RayTrainWorker"))
    client.cancel_job(job.id)
    cancelled = time.monotonic()
    wait_for(lambda: not processes(system, "RayTrainWorker"))
    print(f"workers gone {time.monotonic() - cancelled:.1f} s after the cancel")
    assert client.wait(job.id, timeout_s=240).status == "cancelled"


@pytest.mark.slow
def test_a_dataset_of_broken_images_fails_the_job_and_leaves_no_shards(
    client: Client, system: LocalSystem, base: str, tmp_path: Path
):
    rows = pair_rows(20)
    for row in rows:
        row["jpg_0"] = b"broken"
    broken = client.create_dataset("broken", write_pairs(tmp_path / "broken.parquet", rows).as_uri())
    training = TrainConfig(steps=1, batch_size=4)
    ended = client.wait(client.create_job(job_request(base, broken.id, training=training)).id, timeout_s=240)
    assert ended.status == "failed"
    assert ended.reason.code == "too_many_bad_rows"
    assert "18 of 20 rows are bad (image_not_an_image 18)" in ended.reason.message
    paths = files.list_files(files.join(system.storage_uri, "datasets"), recursive=True)
    shards = {name.split("/")[0] for name in paths if "/shard-" in name}
    assert shards == {name.split("/")[0] for name in paths if name.endswith("manifest.json")}, (
        "no shards without a manifest"
    )


BAD_JOBS = {
    "timestep that the schedule does not have": ({"objective": {"t_max": 5000}}, "objective.t_max", "5000"),
    "unknown model": ({"model": "nope"}, "model", "nope"),
    "unknown dataset": ({"dataset": "ds_nope"}, "dataset", "ds_nope"),
    "unknown method": ({"objective": {"method": "ppo"}}, "objective.method", "ppo"),
    "beta of zero": ({"objective": {"beta": 0}}, "objective.beta", "got 0"),
    "negative beta": ({"objective": {"beta": -1}}, "objective.beta", "-1"),
    "no steps": ({"training": {"steps": 0}}, "training.steps", "got 0"),
    "negative steps": ({"training": {"steps": -5}}, "training.steps", "-5"),
    "unknown field": ({"colour": "red"}, "colour", "red"),
    "unknown nested field": ({"training": {"epochs": 3}}, "training.epochs", "3"),
    "odd size": ({"evaluation": {"height": 33}}, "evaluation.sample.height", "33"),
    "batch larger than the dataset": (
        {"training": {"steps": 1, "batch_size": 500}},
        "training.batch_size",
        "500",
    ),
}


@pytest.mark.parametrize("name", BAD_JOBS)
def test_a_bad_job_is_refused_with_field_and_value(system: LocalSystem, base: str, dataset: str, name: str):
    changes, field, value = BAD_JOBS[name]
    body = job_request(base, dataset).model_dump(mode="json") | changes
    if "evaluation" in changes:
        body["evaluation"] = job_request(base, dataset).evaluation.model_dump(mode="json") | {
            "sample": changes["evaluation"]
        }
    answer = post(system, "/v1/alignment/jobs", body)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["param"] == field
    assert value in error["message"]


BAD_IMAGES = {
    "size": ({"size": "33x32"}, "33x32"),
    "n": ({"n": 1000}, "1000"),
    "model": ({"model": "nope"}, "nope"),
    "prompt": ({"prompt": ""}, 'got ""'),
}


@pytest.mark.parametrize("field", BAD_IMAGES)
def test_a_bad_image_request_is_refused_with_field_and_value(system: LocalSystem, base: str, field: str):
    changes, value = BAD_IMAGES[field]
    answer = post(system, "/v1/images/generations", {"model": base, "prompt": "a red circle", **changes})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == field
    assert value in answer.json()["error"]["message"]


def nan_weight(data: bytes) -> bytes:
    return data[:-4] + np.float32("nan").tobytes()


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda data: data[:-4], "cannot be loaded: unet/diffusion_pytorch_model.safetensors is cut off"),
        (nan_weight, "gives no images: image 0 of the request has infinite or NaN values"),
    ],
    ids=["cut off", "one NaN"],
)
def test_a_model_that_was_damaged_after_its_registration_is_an_error_with_its_cause(
    system: LocalSystem, client: Client, tmp_path: Path, damage: Callable[[bytes], bytes], cause: str
):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    name = f"damaged-{len(cause)}"
    client.create_model(name, (tmp_path / "model").as_uri())
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    answer = post(system, "/v1/images/generations", {"model": name, "prompt": "a red circle"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (500, "model_unusable", "model")
    assert error["message"].startswith(f"model {name!r} {cause}")
    assert error["message"][:200] in (system.logs / "control.log").read_text()


def bad_dataset(tmp_path: Path, name: str) -> tuple[Path, str]:
    """A file that is not a dataset, and the text that its error contains."""
    path, rows = tmp_path / "pairs.parquet", pair_rows(10)
    if name == "no Parquet":
        path.write_bytes(b"PAR1 but not really")
        return path, "not a complete Parquet file"
    if name == "missing columns":
        return write_pairs(
            path, [{key: row[key] for key in ("jpg_0", "caption")} for row in rows]
        ), "jpg_1, label_0, label_1"
    if name == "no decided pair":
        return write_pairs(
            path, [{**row, "label_0": 0.5, "label_1": 0.5} for row in rows]
        ), "no decided pair: 10 rows, 10 ties"
    return path, "does not exist"


@pytest.mark.parametrize("name", ["no Parquet", "missing columns", "no decided pair", "no file"])
def test_a_bad_dataset_is_refused_with_its_uri(client: Client, tmp_path: Path, name: str):
    path, text = bad_dataset(tmp_path, name)
    with pytest.raises(ApiError) as refused:
        client.create_dataset("bad", path.as_uri())
    assert refused.value.status == (404 if name == "no file" else 400)
    assert refused.value.param == "uri"
    assert text in refused.value.message
    assert str(path) in refused.value.message


def test_the_systems_own_key_and_database_are_no_prompts(system: LocalSystem):
    for name in ("key", "dde.db", "logs/control.log"):
        body = {"models": ["m", "n"], "prompts_uri": str(system.state / name), "num_prompts": 2}
        answer = post(system, "/v1/evaluations", body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "source_not_allowed")
        assert system.key not in answer.text


def test_a_wrong_key_is_refused(system: LocalSystem):
    answer = httpx.get(f"{system.url}/v1/models", headers={"Authorization": "Bearer wrong"}, timeout=120)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def post(system: LocalSystem, path: str, body: dict) -> httpx.Response:
    return httpx.post(
        f"{system.url}{path}", json=body, headers={"Authorization": f"Bearer {system.key}"}, timeout=120
    )
