"""Jobs from creation to their end. Stages leave real files in a temporary storage; Ray is a fake launcher."""

from __future__ import annotations

import threading
import time

import pyarrow as pa
import pytest
from sqlalchemy import select, update

from services.artifacts import models
from services.control import attempt
from services.control.job_update import JobUpdate
from services.control.reconciler import StaleToken
from services.control.review import JobReview
from services.control.tables import Event, Job, Metric, Model
from services.control.transitions import STAGES
from services.pairs.source import open_source
from services.pairs.validation import inspect
from services.stages import layout
from services.storage import files
from tests.services.control import fakes
from tests.services.control.conftest import write_pairs

JOBS = "/v1/alignment/jobs"


def done(job: dict) -> list[str]:
    """The stages that have a result."""
    return [stage for stage, result in job["result"].items() if result]


def test_a_job_goes_through_every_stage_to_a_served_model(each_plane):
    plane = each_plane
    job = plane.job(name="aligned")
    assert (job["status"], job["aligned_model"], job["result"], job["started_at"]) == (
        "validating",
        None,
        dict.fromkeys([*STAGES["alignment"], "gate"]),
        None,
    )
    plane.settle()
    ended = plane.get(f"{JOBS}/{job['id']}")
    assert (ended["status"], ended["reason"], ended["stage"]) == ("succeeded", None, None)
    assert plane.launcher.submitted == [
        f"{job['id']}-{stage}-a1" for stage in ("encode", "train", "evaluate")
    ]
    assert set(ended["stage_seconds"]) == set(done(ended)) == {"encode", "train", "evaluate"}
    assert ended["created_at"] <= ended["started_at"] <= ended["finished_at"]

    record = models.find(plane.settings.storage_uri, "aligned")
    base = plane.get("/v1/models/shapes")
    assert record.id == ended["aligned_model"] == plane.get("/v1/models/aligned")["version"]
    assert (record.base, record.job) == (base["version"], job["id"])
    assert record.lineage == {"job": job["id"], "dataset": "d1", "base": base["digest"]}
    assert ended["result"]["train"]["model"] == record.model_dump()


def test_encoding_reads_the_split_and_the_columns_that_were_registered(plane):
    folder = plane.root / "splits"
    folder.mkdir()
    for split in ("train", "test"):
        write_pairs(folder / split, caption=None, prompt=pa.array([split] * 10))
    request = {"name": "splits", "uri": folder.as_uri(), "split": "train", "columns": {"caption": "prompt"}}
    job = plane.job(dataset=plane.post("/v1/datasets", request)["id"])
    plane.settle()
    source = plane.launcher.specs[f"{job['id']}-encode-a1"].source
    assert (source.split, source.columns) == ("train", {"caption": "prompt"})
    assert inspect(open_source(source))[0].rows == 10


def test_every_stage_receives_the_uris_of_its_input_and_output(plane):
    job = plane.job(objective={"beta": 7.0})
    plane.settle()
    root = plane.app_settings.storage_uri
    encode, train, evaluate = (
        plane.launcher.specs[f"{job['id']}-{stage}-a1"] for stage in ("encode", "train", "evaluate")
    )
    assert encode.prefix == f"{root}/jobs/{job['id']}/encode/a1"
    assert (encode.output, encode.source.uri) == (f"{root}/datasets", plane.dataset["uri"])
    assert encode.source_digest == plane.dataset["digest"]
    assert (train.dataset, train.objective.beta, train.training.steps) == (f"{root}/datasets/key", 7.0, 2)
    assert (train.run, train.output) == (
        f"{root}/jobs/{job['id']}/train/run",
        f"{root}/models/{train.model_id}",
    )
    assert (evaluate.base, [model.uri for model in evaluate.models][1]) == ("shapes", train.output)
    assert evaluate.output == f"{root}/jobs/{job['id']}/evaluate/a1"
    assert evaluate.evaluation.prompts_uri == files.as_uri(plane.root / "prompts.txt")
    command = f"python -m services.ingest encode --spec {encode.prefix}/spec.json"
    assert plane.launcher.entrypoints[f"{job['id']}-encode-a1"] == command


def test_training_receives_its_validation_with_uris(plane):
    evaluation = {"prompts_uri": str(plane.root / "prompts.txt"), "num_prompts": 2, "seed": 3}
    validation = {"every": 50, "num_prompts": 1, "best_metric": "taste"}
    own = {"prompts_uri": str(plane.root / "prompts.txt"), "num_prompts": 3}
    training = {"steps": 50, "batch_size": 4}
    validations = (None, validation, validation | own)
    jobs = [plane.job(evaluation=evaluation, validation=each, training=training) for each in validations]
    plane.settle(60)
    without, following, separate = (plane.launcher.specs[f"{job['id']}-train-a1"] for job in jobs)
    uri = files.as_uri(plane.root / "prompts.txt")
    assert (without.validation, without.evaluation.seed) == (None, 3)
    assert (following.validation.prompts_uri, following.evaluation.prompts_uri) == (None, uri)
    assert (separate.validation.prompts_uri, separate.validation.num_prompts) == (uri, 3)
    assert [job["validation"] and job["validation"]["every"] for job in jobs] == [None, 50, 50]
    assert separate.validation.model_dump(mode="json") == jobs[2]["validation"]


def test_prompts_that_validation_does_not_draw_are_reported_as_unused(plane):
    idle = {"every": 50, "prompts_uri": "nowhere.txt"}
    job = plane.job(validation=idle, training={"steps": 50, "batch_size": 4, "held_out_pairs": 2})
    assert "validation.prompts_uri is ignored: validation.num_prompts is 0" in plane.events(job["id"])


def test_a_single_worker_shares_nothing_out_and_may_have_8_bit_moments(plane):
    training = {"steps": 2, "batch_size": 4, "parallelism": "fsdp", "optimizer": "adamw_8bit"}
    assert plane.job(training=training)["training"]["optimizer"] == "adamw_8bit"


def test_training_receives_its_range_of_workers(plane):
    job = plane.job(workers=[1, 4])
    plane.settle()
    assert job["workers"] == [1, 4]
    assert plane.launcher.specs[f"{job['id']}-train-a1"].workers == (1, 4)


def test_a_job_that_requests_a_ledger_writes_it_between_encoding_and_training(any_plane):
    plane = any_plane
    job = plane.job(
        training={"steps": 2, "batch_size": 4, "reference": "ledger", "draws": 3}, objective={"beta": 7.0}
    )
    plane.settle(40)
    stages = ("encode", "ledger", "train", "evaluate")
    ended = plane.get(f"{JOBS}/{job['id']}")
    assert ended["status"] == "succeeded"
    assert plane.launcher.submitted == [f"{job['id']}-{stage}-a1" for stage in stages]
    assert set(ended["stage_seconds"]) == set(done(ended)) == set(stages)
    encode, ledger, train, _ = (plane.launcher.specs[f"{job['id']}-{stage}-a1"] for stage in stages)
    assert (ledger.dataset, ledger.model, ledger.objective.beta) == (train.dataset, train.model, 7.0)
    assert (ledger.training, ledger.use_gpu) == (train.training, encode.use_gpu)
    assert train.ledger == ended["result"]["ledger"]["ledger"]
    assert plane.launcher.entrypoints[f"{job['id']}-ledger-a1"].startswith(
        "python -m services.ingest ledger --spec "
    )
    messages = [text for text in plane.events(job["id"]) if "stage ledger" in text or "->" in text]
    assert messages[1:4] == ["queued -> preparing: stage encode", "stage ledger", "stage ledger done"]
    rows = plane.get(f"{JOBS}/{job['id']}/metrics?stage=ledger")["data"]
    assert [row["step"] for row in rows] == [1, 2]


def test_a_ledger_that_fails_or_is_cancelled_ends_its_job(plane):
    plane.launcher.plays["ledger"] = fakes.fails
    training = {"steps": 2, "batch_size": 4, "reference": "ledger"}
    job = plane.job(training=training)
    plane.settle()
    ended = plane.get(f"{JOBS}/{job['id']}")
    assert (ended["status"], ended["stage"], ended["reason"]["param"]) == ("failed", "ledger", "beta")
    plane.launcher.plays["ledger"] = fakes.runs
    job = plane.job(training=training)
    plane.settle()
    assert (plane.get(f"{JOBS}/{job['id']}")["status"], plane.get(f"{JOBS}/{job['id']}")["stage"]) == (
        "preparing",
        "ledger",
    )
    plane.post(f"{JOBS}/{job['id']}/cancel", {})
    plane.settle()
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "cancelled"
    assert f"{job['id']}-ledger-a1" in plane.launcher.stopped


def test_a_method_without_a_reference_writes_no_ledger_and_logs_a_warning(plane):
    training = {"steps": 2, "batch_size": 4, "reference": "ledger"}
    job = plane.job(training=training, objective={"method": "sft"})
    plane.settle()
    assert plane.launcher.submitted == [
        f"{job['id']}-{stage}-a1" for stage in ("encode", "train", "evaluate")
    ]
    assert plane.launcher.specs[f"{job['id']}-train-a1"].ledger is None
    assert "method 'sft' ignores training.reference = 'ledger'" in plane.events(job["id"])
    job = plane.job(training=training | {"reference": "auto"})
    plane.settle()
    assert f"{job['id']}-ledger-a1" not in plane.launcher.submitted, (
        "what is there already is found by training itself"
    )


def test_events_and_metrics_of_the_journal_are_recorded_once_and_in_order(any_plane):
    plane = any_plane
    job = plane.job()
    plane.settle()
    messages = plane.events(job["id"])
    assert messages[:3] == [
        "created: dde on shapes with dataset pairs",
        "validating -> queued: the job is valid",
        "queued -> preparing: stage encode",
    ]
    assert [text for text in messages if text.startswith("step")] == [
        f"step {i}" for i in (1, 2, 3, 1, 2, 3, 4, 5, 1)
    ]
    assert messages[-1] == "evaluating -> succeeded: the job is done"
    rows = plane.get(f"{JOBS}/{job['id']}/metrics?stage=train")["data"]
    assert [(row["step"], row["metrics"]) for row in rows] == [(i, {"loss": 1.0 / i}) for i in range(1, 6)]
    assert [row["step"] for row in plane.get(f"{JOBS}/{job['id']}/metrics?stage=train&after=3")["data"]] == [
        4,
        5,
    ]


def test_a_step_that_is_trained_again_replaces_its_numbers(plane):
    plane.launcher.plays["encode"] = fakes.runs
    job = plane.job()
    plane.settle(10)
    fakes.journal(plane.launcher.specs[f"{job['id']}-encode-a1"], 2)
    plane.settle(3)
    assert [row["step"] for row in plane.get(f"{JOBS}/{job['id']}/metrics")["data"]] == [1, 2]


def test_a_long_journal_is_read_in_parts_before_its_stage_ends(plane, monkeypatch):
    monkeypatch.setattr(attempt, "JOURNAL_FILES", 2)
    job = plane.job()
    plane.settle(60)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "succeeded"
    assert sum(text.startswith("step") for text in plane.events(job["id"])) == 9


def test_an_evaluation_runs_its_one_stage(any_plane):
    plane = any_plane
    body = plane.evaluation_body()
    made = plane.post("/v1/evaluations", body)
    assert (made["status"], made["result"], made["scorers"]) == (
        "queued",
        None,
        ["match", "taste", "fidelity"],
    )
    plane.settle()
    ended = plane.get(f"/v1/evaluations/{made['id']}")
    assert ended["status"] == "succeeded"
    assert set(ended["result"]["scores"]) == {"match", "taste", "fidelity"}
    assert plane.launcher.submitted == [f"{made['id']}-evaluate-a1"]
    assert "stage evaluate done" in [
        event["message"] for event in plane.get(f"/v1/evaluations/{made['id']}/events")["data"]
    ]


def test_a_model_aligned_further_under_its_own_name_is_compared_with_the_version_before(plane):
    first = plane.job(name="aligned")["id"]
    plane.settle()
    version = plane.get(f"{JOBS}/{first}")["aligned_model"]
    second = plane.job(model="aligned", name="aligned")["id"]
    plane.settle()
    spec = plane.launcher.specs[f"{second}-evaluate-a1"]
    assert (spec.base, [model.name for model in spec.models]) == (version, [version, "aligned"])
    assert plane.get(f"{JOBS}/{second}")["status"] == "succeeded"


def test_two_versions_of_one_model_are_compared_under_names_of_their_own(plane):
    first = plane.job(name="aligned")
    plane.settle(60)
    before = plane.get(f"/v1/alignment/jobs/{first['id']}")["aligned_model"]
    plane.job(name="aligned")
    plane.settle(60)
    models = ["aligned", {"name": "before", "model": before}]
    evaluation = plane.post("/v1/evaluations", plane.evaluation_body(models=models, base="before"))
    named = {each["name"]: each["model"] for each in evaluation["models"]}
    assert (named["before"], evaluation["base"]) == (before, "before")
    assert named["aligned"] not in (before, None)
    plane.settle(30)
    spec = plane.launcher.specs[f"{evaluation['id']}-evaluate-a1"]
    assert [(model.name, model.id) for model in spec.models] == list(named.items())
    assert spec.base == "before"
    same = [{"name": each["name"], "model": each["model"]} for each in evaluation["models"]]
    repeated = plane.post("/v1/evaluations", plane.evaluation_body(models=same, base="before"))
    assert repeated["models"] == evaluation["models"]
    unknown = plane.evaluation_body(models=["shapes", {"name": "x", "model": "nobody"}])
    assert plane.error("/v1/evaluations", unknown, 404)["param"] == "models.1.model"


def test_a_model_that_an_unfinished_evaluation_compares_cannot_be_deleted(plane):
    plane.launcher.plays["evaluate"] = fakes.runs
    made = plane.post("/v1/evaluations", plane.evaluation_body(models=["rival", "shapes"]))
    for name in ("shapes", "rival"):
        answer = plane.http.delete(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "in_use")
        assert made["id"] in answer.json()["error"]["message"]
    plane.post(f"/v1/evaluations/{made['id']}/cancel", None)
    plane.settle()
    assert plane.http.delete("/v1/models/rival").status_code == 200


def test_deleting_a_model_deletes_the_images_that_evaluations_drew_with_it(plane):
    record = models.find(plane.settings.storage_uri, "shapes")
    images = layout.images_folder(plane.settings.storage_uri)
    of_model = layout.images_uri(layout.images_of(images, models.identity(record)), "k")
    of_another = layout.images_uri(layout.images_of(images, "0" * 32), "k")
    for uri in (of_model, of_another):
        files.write_bytes(uri, b"images")
    assert plane.http.delete("/v1/models/shapes").status_code == 200
    assert (files.exists(of_model), files.exists(of_another)) == (False, True)


def test_a_stage_that_fails_fails_the_job_with_its_message(plane):
    plane.launcher.plays["train"] = fakes.fails
    job = plane.job()
    plane.settle()
    ended = plane.get(f"{JOBS}/{job['id']}")
    assert (ended["status"], ended["stage"], ended["aligned_model"]) == ("failed", "train", None)
    assert ended["reason"] == {
        "code": "ConfigError",
        "message": "beta must be positive, got -1",
        "param": "beta",
    }
    assert ended["finished_at"] is not None


def test_a_marker_within_the_grace_overrides_what_ray_reports(plane):
    plane.launcher.plays["encode"] = fakes.dies
    job = plane.job()
    plane.settle(6)
    fakes.encode(plane.launcher.specs[f"{job['id']}-encode-a1"])
    plane.settle()
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "succeeded"


def test_a_driver_that_ray_calls_dead_but_that_still_writes_is_not_given_up(plane):
    plane.launcher.plays["encode"] = fakes.dies
    job = plane.job()
    plane.settle(6)
    for _ in range(3):
        fakes.journal(plane.launcher.specs[f"{job['id']}-encode-a1"], 1)
        plane.clock.now += plane.settings.driver_grace_s
        plane.settle(2)
        assert plane.get(f"{JOBS}/{job['id']}")["status"] == "preparing"


def test_a_result_that_cannot_be_read_fails_the_job(plane):
    def nonsense(spec):
        files.write_json(f"{spec.prefix}/done.json", {"dataset": 3})
        return "succeeded"

    plane.launcher.plays["encode"] = nonsense
    job = plane.job()
    plane.settle()
    reason = plane.get(f"{JOBS}/{job['id']}")["reason"]
    assert reason["code"] == "bad_result"
    assert reason["message"].startswith("done.json of stage encode cannot be read:")


@pytest.mark.parametrize("before", [0, 6])
def test_ray_out_of_reach_fails_the_job_after_a_while_and_not_before(plane, before):
    plane.launcher.plays["encode"] = fakes.runs
    job = plane.job()
    plane.settle(before)
    plane.launcher.down = True
    plane.settle(8)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "preparing"
    assert any(text.startswith("waiting for Ray:") for text in plane.events(job["id"]))
    plane.clock.now += plane.settings.unreachable_s
    plane.settle(2)
    ended = plane.get(f"{JOBS}/{job['id']}")
    assert (ended["status"], ended["reason"]["code"]) == ("failed", "cluster_unreachable")


def test_a_run_that_writes_its_journal_lives_however_long_ray_is_away(plane):
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    spec = plane.launcher.specs[f"{job}-train-a1"]
    plane.launcher.down = True
    plane.settle(2)
    for _ in range(4):
        fakes.journal(spec, 1)
        plane.clock.now += plane.settings.unreachable_s
        plane.settle(2)
        assert plane.get(f"{JOBS}/{job}")["status"] == "running"
    assert sum(text.startswith("waiting for Ray:") for text in plane.events(job)) == 1, "it is logged once"
    assert not files.exists(f"{spec.prefix}/stop.json")

    plane.clock.now += plane.settings.unreachable_s - 5
    plane.settle(2)
    assert plane.get(f"{JOBS}/{job}")["status"] == "running", (
        "silence is counted from the journal's last entry"
    )
    plane.clock.now += 5
    plane.settle(2)
    ended = plane.get(f"{JOBS}/{job}")
    assert (ended["status"], ended["reason"]["code"]) == ("failed", "cluster_unreachable")
    assert "and the journal did not grow: Ray at http://nowhere does not answer" in ended["reason"]["message"]
    assert files.exists(f"{spec.prefix}/stop.json"), "a run that lives nevertheless stores its state and ends"


def test_a_long_journal_of_a_run_without_ray_is_read_to_its_end_before_its_job_is_given_up(
    plane, monkeypatch
):
    monkeypatch.setattr(attempt, "JOURNAL_FILES", 2)
    plane.launcher.plays["encode"] = fakes.runs
    job = plane.job()["id"]
    plane.settle(8)
    plane.launcher.down = True
    plane.settle(2)
    fakes.journal(plane.launcher.specs[f"{job}-encode-a1"], 2)
    plane.clock.now += plane.settings.unreachable_s
    plane.settle(4)
    assert plane.get(f"{JOBS}/{job}")["status"] == "preparing"


def test_ray_that_comes_back_in_time_lets_the_job_go_on(plane):
    plane.launcher.down = True
    job = plane.job()
    plane.settle(8)
    plane.launcher.down = False
    plane.settle()
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "succeeded"


def test_cancel_stops_the_run_and_ends_as_cancelled(any_plane):
    plane = any_plane
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()
    plane.settle()
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "running"
    assert plane.post(f"{JOBS}/{job['id']}/cancel", None)["status"] == "running"
    plane.settle()
    ended = plane.get(f"{JOBS}/{job['id']}")
    assert (ended["status"], ended["reason"]["code"], ended["stage"]) == ("cancelled", "cancelled", "train")
    assert plane.launcher.stopped == [f"{job['id']}-train-a1"]
    assert plane.events(job["id"]).count("cancel requested") == 1
    assert plane.post(f"{JOBS}/{job['id']}/cancel", None) == ended


def test_cancel_before_anything_ran_starts_nothing(plane):
    job = plane.job()
    plane.post(f"{JOBS}/{job['id']}/cancel", None)
    plane.settle()
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "cancelled"
    assert plane.launcher.submitted == plane.launcher.stopped == []


def test_cancel_with_ray_out_of_reach_ends_after_a_while_with_a_warning(plane):
    plane.launcher.plays["encode"] = fakes.runs
    job = plane.job()
    plane.settle(6)
    plane.launcher.down = True
    plane.post(f"{JOBS}/{job['id']}/cancel", None)
    plane.settle(5)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "preparing"
    plane.clock.now += plane.settings.unreachable_s
    plane.settle(2)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "cancelled"
    assert "Ray did not confirm that the run ended; it may still be running" in plane.events(job["id"])


@pytest.mark.parametrize(("play", "status"), [(fakes.evaluate, "succeeded"), (fakes.fails, "failed")])
def test_cancel_of_a_job_that_has_ended_is_a_conflict_that_names_its_status(plane, play, status):
    plane.launcher.plays["evaluate"] = play
    job = plane.job()
    plane.settle()
    error = plane.error(f"{JOBS}/{job['id']}/cancel", None, 409)
    assert error["message"] == f"job {job['id']} has {status} already"


def test_a_model_whose_evaluation_failed_is_kept_without_its_name(plane):
    plane.launcher.plays["evaluate"] = fakes.fails
    job = plane.job(name="aligned")
    plane.settle()
    ended = plane.get(f"{JOBS}/{job['id']}")
    assert not plane.get(f"/v1/models/{ended['aligned_model']}")["current"]
    plane.get("/v1/models/aligned", 404)
    assert not files.exists(f"{plane.settings.storage_uri}/aliases/aligned.json")


def test_a_name_means_the_model_that_got_it_last(any_plane):
    plane = any_plane
    first, second = (plane.job(name="aligned")["id"] for _ in range(2))
    plane.settle(60)
    aligned = [plane.get(f"{JOBS}/{job}")["aligned_model"] for job in (first, second)]
    current = plane.get("/v1/models/aligned")["version"]
    assert current in aligned
    assert models.find(plane.settings.storage_uri, "aligned").id == current
    assert [plane.get(f"/v1/models/{model}")["current"] for model in aligned].count(True) == 1


def test_what_is_found_under_a_stale_token_changes_nothing(each_plane):
    plane = each_plane
    job = plane.job(name="aligned")
    slow, fast = plane.reconciler(), plane.reconciler()
    plane.clock.now = time.time()
    taken = slow.take()
    assert taken.id == job["id"]
    assert fast.take() is None
    plane.clock.now += plane.settings.lock_s + 1
    assert fast.take().id == job["id"]
    stale = JobUpdate(taken, plane.clock.now, values={"status": "succeeded"}, set_alias=True)
    stale.log("too late")
    stale.publish = models.find(plane.settings.storage_uri, "shapes").model_copy(
        update={"id": "model_" + "0" * 24}
    )
    with pytest.raises(StaleToken):
        slow.apply(stale)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "validating"
    assert "too late" not in plane.events(job["id"])
    assert not files.exists(f"{plane.settings.storage_uri}/aliases/aligned.json")
    assert not files.exists(f"{plane.settings.storage_uri}/models/model_{'0' * 24}.json")


def test_two_reconcilers_on_one_database_submit_each_stage_once(each_plane):
    plane = each_plane
    jobs = [plane.job()["id"] for _ in range(4)]
    failures: list[Exception] = []

    def work() -> None:
        reconciler = plane.reconciler()
        try:
            for _ in range(60):
                if not reconciler.once():
                    plane.clock.now += plane.settings.poll_interval_s
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {plane.get(f"{JOBS}/{job}")["status"] for job in jobs} == {"succeeded"}
    assert len(plane.launcher.submitted) == len(set(plane.launcher.submitted)) == 12
    with plane.database.read() as session:
        events, metrics = (list(session.scalars(select(table.job))) for table in (Event, Metric))
    assert {events.count(job) for job in jobs} == {events.count(jobs[0])}
    assert {metrics.count(job) for job in jobs} == {9}


def test_a_crash_between_submit_and_its_record_submits_nothing_twice(plane):
    job = plane.job()
    reconciler = plane.reconciler()
    for _ in range(3):
        reconciler.once()
    with plane.database.write() as session:
        session.execute(update(Job).values(submitted_at=None, lock_token=None, lock_expires_at=None))
    plane.settle()
    assert plane.launcher.submitted.count(f"{job['id']}-encode-a1") == 1
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "succeeded"


def test_an_unexpected_error_is_logged_once_retried_with_growing_pauses_and_stops_no_other_job(plane):
    def broken(spec):
        raise ZeroDivisionError("a bug")

    plane.launcher.plays["encode"] = broken
    bad = plane.job()
    plane.settle(8)
    plane.launcher.plays["encode"] = fakes.encode
    body = plane.evaluation_body()
    good = plane.post("/v1/evaluations", body)
    with plane.database.read() as session:
        row = session.scalar(select(Job).where(Job.id == bad["id"]))
    assert row.failures >= 2
    assert row.next_at - plane.clock.now > plane.settings.poll_interval_s
    plane.settle(10)
    assert plane.get(f"/v1/evaluations/{good['id']}")["status"] == "succeeded"
    assert (
        plane.events(bad["id"]).count("the review failed and will be retried: ZeroDivisionError: a bug") == 1
    )
    plane.clock.now += 60
    plane.settle(40)
    assert plane.get(f"{JOBS}/{bad['id']}")["status"] == "succeeded"


def test_a_job_that_waits_for_a_slot_is_not_reviewed_until_there_is_one(plane):
    plane.settings.max_active_jobs = 1
    plane.launcher.plays["encode"] = fakes.runs
    first, second, third = (plane.job()["id"] for _ in range(3))
    plane.settle()
    plane.clock.now += 10 * plane.settings.poll_interval_s
    assert [job.id for job in iter(plane.reconciler().take, None)] == [first]
    plane.post(f"{JOBS}/{first}/cancel", None)
    plane.clock.now += plane.settings.lock_s + 1
    plane.settle()
    assert [plane.get(f"{JOBS}/{job}")["status"] for job in (second, third)] == ["preparing", "queued"]
    plane.post(f"{JOBS}/{third}/cancel", None)
    plane.settle()
    assert plane.get(f"{JOBS}/{third}")["status"] == "cancelled", "a request is carried out at once"


@pytest.mark.parametrize("verb", ["pause", "cancel"])
def test_a_request_that_comes_while_a_job_is_being_parked_is_carried_out_at_once(plane, verb):
    plane.settings.max_active_jobs = 0
    job = plane.job()["id"]
    plane.clock.now = time.time()
    reconciler = plane.reconciler()
    review = JobReview(reconciler.take(), plane.settings, plane.launcher, plane.clock.now)
    update = review.decide()
    plane.post(f"{JOBS}/{job}/{verb}", None)
    reconciler.apply(update)
    plane.settle(3)
    assert plane.get(f"{JOBS}/{job}")["status"] == {"pause": "paused", "cancel": "cancelled"}[verb]


def test_a_higher_limit_starts_the_jobs_that_wait(plane):
    plane.settings.max_active_jobs = 0
    waiting = plane.job()["id"]
    plane.settle()
    assert plane.get(f"{JOBS}/{waiting}")["status"] == "queued"
    plane.settings.max_active_jobs = 1
    plane.settle(80)
    assert plane.get(f"{JOBS}/{waiting}")["status"] == "succeeded"


def test_jobs_beyond_the_limit_wait_as_queued_the_oldest_first(plane):
    plane.settings.max_active_jobs = 1
    plane.launcher.plays["encode"] = fakes.runs
    first, second, third = (plane.job()["id"] for _ in range(3))
    plane.settle()
    assert [plane.get(f"{JOBS}/{job}")["status"] for job in (first, second, third)] == [
        "preparing",
        "queued",
        "queued",
    ]
    plane.post(f"{JOBS}/{first}/cancel", None)
    plane.settle()
    assert [plane.get(f"{JOBS}/{job}")["status"] for job in (second, third)] == ["preparing", "queued"]


def test_a_dataset_whose_files_went_after_it_was_registered_fails_the_job_at_once(plane):
    dataset = plane.dataset
    job = plane.job()
    files.delete_folder(dataset["uri"])
    plane.settle()
    reason = plane.get(f"{JOBS}/{job['id']}")["reason"]
    assert (reason["code"], reason["param"]) == ("dataset_not_found", "dataset")
    assert plane.launcher.submitted == []


def test_an_aligned_model_can_be_aligned_again(plane):
    plane.job(name="once")
    plane.settle()
    again = plane.job(model="once", name="twice")
    plane.settle()
    assert plane.get("/v1/models/twice")["base"] == again["model"] == plane.get("/v1/models/once")["version"]
    with plane.database.read() as session:
        assert len(list(session.scalars(select(Model)))) == 3
