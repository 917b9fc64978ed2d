"""Studies: what is refused at once, cells as ordinary jobs, one comparison and report, kills and cancels."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from dde_core.student_t import t_quantile
from services.api.records import EvaluateResult, Interval, ScorerReport
from services.artifacts import models
from services.control import studies
from services.control.database import Database
from services.control.reconciler import Reconciler
from services.control.tables import Job
from services.stages import layout
from services.storage import files
from tests.services.control import fakes
from tests.services.control.conftest import Plane, write_base
from tests.services.control.test_access import bearer, new_key
from tests.services.control.test_made_datasets import generate_body
from tests.services.control.test_scorers import insert

STUDIES = "/v1/studies"
JOBS = "/v1/alignment/jobs"
GAIN = {"dde": 0.2, "sft": 0.05}
"""What each method adds to the base's taste, in these tests."""


def drift_of(name: str) -> float:
    """The method's drift, and a little of the seed's."""
    return (3.0 if "dde" in name else 1.0) + (0.5 if name.endswith("1") and "dde" in name else 0.0)


def evaluate(spec) -> fakes.RunState:
    """Leaves what the evaluate stage does. Scores are made from the model's name, so the truth is known."""
    names = [model.name for model in spec.models]
    num_prompts = spec.evaluation.num_prompts
    scores = []
    for model in names:
        gain = next((gain for method, gain in GAIN.items() if method in model), 0.0)
        of_prompts = [0.5 + 0.01 * i + gain + (0.001 * i if gain else 0.0) for i in range(num_prompts)]
        scores.append([[score - 0.1, score + 0.1] for score in of_prompts])
    report = layout.report_uri(spec.output)
    content = {"models": names, "kinds": {"taste": "taste"}, "scores": {"taste": scores}}
    for each in spec.scorers:
        if each.kind == "drift":
            content["kinds"][each.name] = "drift"
            content["scores"][each.name] = [None, *(drift_of(name) for name in names[1:])]
    files.write_json(report, content)
    fakes.journal(spec, 1)
    one = Interval(value=0.5, low=0.4, high=0.6)
    numbers = ScorerReport(base=0.5, candidate=0.6, difference=one, beat_ratio=one)
    candidates = [name for name in names if name != spec.base]
    return fakes.done(
        spec,
        EvaluateResult(
            report=report,
            grid=layout.grid_uri(spec.output),
            base=spec.base,
            num_prompts=num_prompts,
            images_per_prompt=2,
            images_drawn=len(candidates) * num_prompts,
            scores={"taste": dict.fromkeys(candidates, numbers)},
            seconds=2.0,
        ),
    )


@pytest.fixture(autouse=True)
def scored(request):
    """Evaluations with scores, on whichever plane the test has."""
    for name in ("plane", "any_plane"):
        if name in request.fixturenames:
            request.getfixturevalue(name).launcher.plays["evaluate"] = evaluate


def body(plane: Plane, **changes) -> dict[str, Any]:
    evaluation = {"prompts_uri": str(plane.root / "prompts.txt"), "num_prompts": 3, "scorers": ["taste"]}
    base = plane.job_body(evaluation=evaluation)
    grid = {"objective.method": ["dde", "sft"], "training.seed": [0, 1]}
    return {"name": "paper", "base": base, "grid": grid, "evaluation": evaluation} | changes


def settle(plane: Plane, study: dict, looks: int = 400) -> dict:
    """Review until the study has ended."""
    for _ in range(looks // 20):
        plane.settle(20)
        seen = plane.get(f"{STUDIES}/{study['id']}")
        if seen["status"] in ("succeeded", "failed", "cancelled"):
            return seen
    return seen


def cell_jobs(plane: Plane, study: dict) -> dict[str, dict]:
    """The jobs of the study's cells, by label, as lists of jobs find them."""
    found = plane.get(f"{JOBS}?metadata[study]={study['id']}&limit=100")["data"]
    return {job["metadata"]["cell"]: job for job in found}


def events(plane: Plane, study: dict) -> list[str]:
    return [each["message"] for each in plane.get(f"{STUDIES}/{study['id']}/events?limit=1000")["data"]]


# ---- from a grid to a report


def test_a_study_trains_every_cell_as_a_job_and_compares_all_models(any_plane):
    plane = any_plane
    study = plane.post(STUDIES, body(plane))
    assert (study["object"], study["status"], study["result"]) == ("study", "running", None)
    labels = ["dde-seed0", "dde-seed1", "sft-seed0", "sft-seed1"]
    assert [cell["label"] for cell in study["cells"]] == labels
    assert {cell["status"] for cell in study["cells"]} == {"waiting"}
    done = settle(plane, study)
    assert done["status"] == "succeeded", done["reason"]
    jobs = cell_jobs(plane, study)
    assert list(jobs) == labels[::-1]
    assert {job["status"] for job in jobs.values()} == {"succeeded"}
    for cell in done["cells"]:
        job = jobs[cell["label"]]
        assert (cell["job"], cell["model"], cell["status"]) == (job["id"], job["aligned_model"], "succeeded")
        assert job["name"] == f"paper-{cell['label']}"
        assert job["objective"]["method"] == cell["overrides"]["objective.method"]
        assert job["training"]["seed"] == cell["overrides"]["training.seed"]
        assert models.find(plane.app_settings.storage_uri, job["name"]).id == cell["model"]
    assert plane.get(STUDIES)["data"] == [done]
    assert plane.get(f"{STUDIES}?status=failed")["data"] == []
    assert len(plane.launcher.submitted) == len(set(plane.launcher.submitted))
    assert {plane.get(f"/v1/evaluations/{each}")["status"] for each in done["evaluations"]} == {"succeeded"}


def test_the_report_has_every_contrast_the_costs_and_the_curves(plane):
    def train(spec) -> fakes.RunState:
        state = fakes.train(spec)
        writer = fakes.Journal(spec.prefix, flush_every_s=0.0)
        for step in range(1, 301):
            writer.metrics(step, {"loss": 1 / step})
        writer.metrics(300, {"held_out_accuracy": 0.6, "taste": 0.7})
        writer.flush()
        return state

    plane.launcher.plays["train"] = train
    done = settle(plane, plane.post(STUDIES, body(plane)))
    result = done["result"]
    contrasts = {(each["setting"], each["against"]): each for each in result["contrasts"]}
    assert set(contrasts) == {("dde", None), ("sft", None), ("dde", "sft")}
    between = contrasts["dde", "sft"]
    assert between["difference"]["value"] == pytest.approx(GAIN["dde"] - GAIN["sft"])
    assert (between["seeds"], between["prompts"], between["scorer"]) == (2, 3, "taste")
    base = np.mean([0.5, 0.51, 0.52])
    assert result["base_scores"] == {"taste": pytest.approx(base)}
    settings = {each["setting"]: each for each in result["settings"]}
    assert settings["dde"]["scores"]["taste"] == pytest.approx(base + GAIN["dde"] + 0.001)
    assert settings["dde"]["overrides"] == {"objective.method": "dde"}
    assert (settings["dde"]["cells"], settings["dde"]["models"]) == (2, 2)
    jobs = [job for label, job in cell_jobs(plane, done).items() if label.startswith("dde")]
    for stage, seconds in settings["dde"]["seconds"].items():
        assert seconds == pytest.approx(sum(job["stage_seconds"][stage] for job in jobs))
    assert set(settings["dde"]["seconds"]) == {"encode", "train", "evaluate"}
    assert settings["dde"]["images"] == 2 * 3
    assert (result["images"], result["seconds"]) == (4 * 3, 2.0)
    stored = files.read_json(result["report"])
    assert stored["contrasts"] == result["contrasts"]
    assert set(stored["curves"]) == {"loss", "held_out_accuracy", "taste"}
    assert stored["curves"]["taste"]["dde-seed0"] == [[300, 0.7]]
    thinned = stored["curves"]["loss"]["sft-seed1"]
    assert len(thinned) == 100
    assert thinned[-1] == [300, pytest.approx(np.mean([1 / step for step in (298, 299, 300)]))]
    page = files.read_bytes(result["page"]).decode()
    for part in ("paper", "dde - sft", "+0.1500", "held_out_accuracy", "<polyline", "Cost"):
        assert part in page


def test_drift_is_contrasted_between_settings_over_their_seeds(plane):
    insert(plane, "moved", "drift")
    wanted = body(plane)
    wanted["evaluation"] = {**wanted["evaluation"], "scorers": ["taste", "moved"]}
    result = settle(plane, plane.post(STUDIES, wanted))["result"]
    [found] = [each for each in result["contrasts"] if each["scorer"] == "moved"]
    assert (found["setting"], found["against"]) == ("dde", "sft")
    assert (found["seeds"], found["prompts"], found["by"]) == (2, 3, "t")
    half = t_quantile(0.975, 1) * np.std([2.0, 2.5], ddof=1) / 2**0.5
    assert found["difference"]["value"] == pytest.approx(2.25)
    assert found["difference"]["high"] - 2.25 == pytest.approx(half)
    assert found["adjusted_p"] >= found["p"]
    assert len(result["contrasts"]) == 4
    assert "moved" not in result["base_scores"]
    settings = {each["setting"]: each["scores"] for each in result["settings"]}
    assert (settings["dde"]["moved"], settings["sft"]["moved"]) == (3.25, 1.0)
    assert "<th>moved</th>" in files.read_bytes(result["page"]).decode()


def test_a_single_seed_has_no_contrast_of_drift(plane):
    insert(plane, "moved", "drift")
    wanted = body(plane, grid={"objective.method": ["dde", "sft"]})
    wanted["evaluation"] = {**wanted["evaluation"], "scorers": ["taste", "moved"]}
    result = settle(plane, plane.post(STUDIES, wanted))["result"]
    assert {each["scorer"] for each in result["contrasts"]} == {"taste"}


def test_runs_that_differ_by_their_seeds_alone_are_repetitions_of_one_setting(plane):
    seeds = "training.seed, training.draw_seed"
    study = plane.post(STUDIES, body(plane, grid={"objective.method": ["dde", "sft"], seeds: [0, 1, 2]}))
    assert [cell["label"] for cell in study["cells"]][:3] == ["dde-seed0", "dde-seed1", "dde-seed2"]
    done = settle(plane, study)
    training = cell_jobs(plane, study)["dde-seed2"]["training"]
    assert (training["seed"], training["draw_seed"]) == (2, 2)
    assert {each["setting"] for each in done["cells"]} == {"dde", "sft"}
    assert {each["seeds"] for each in done["result"]["contrasts"]} == {3}
    assert done["result"]["settings"][0]["overrides"] == {"objective.method": "dde"}


def test_settings_whose_names_would_be_the_same_are_told_apart(plane):
    grid = {"objective.method": ["dde"], "training.seed": [0, 1]}
    cells = [{"label": "dde", "overrides": {"objective.beta": 7}}]
    study = plane.post(STUDIES, body(plane, grid=grid, cells=cells))
    assert [cell["setting"] for cell in study["cells"]] == ["dde", "dde", "dde-2"]


def test_at_most_as_many_cells_run_at_a_time_as_the_study_allows(plane):
    plane.launcher.plays["encode"] = fakes.runs
    study = plane.post(STUDIES, body(plane, parallel=3))
    plane.settle(60)
    running = [job for job in cell_jobs(plane, study).values() if job["status"] == "preparing"]
    assert len(running) == len(cell_jobs(plane, study)) == 3
    seen = plane.get(f"{STUDIES}/{study['id']}")
    assert [cell["status"] for cell in seen["cells"]] == ["preparing"] * 3 + ["waiting"]


def test_studies_take_no_slot_of_the_cluster_from_their_own_cells(plane):
    plane.settings = plane.settings.model_copy(update={"max_active_jobs": 1})
    one = plane.post(STUDIES, body(plane, name="one"))
    two = plane.post(STUDIES, body(plane, name="two"))
    assert settle(plane, one, 800)["status"] == "succeeded"
    assert settle(plane, two, 800)["status"] == "succeeded"


def test_a_grid_of_one_cell_has_intervals_over_prompts(plane):
    done = settle(plane, plane.post(STUDIES, body(plane, grid={"objective.method": ["dde"]})))
    [contrast] = done["result"]["contrasts"]
    assert (contrast["seeds"], contrast["by"]) == (1, "bootstrap")


def test_listed_cells_join_the_grid_and_exclusions_leave_it(plane):
    grid = {"objective.method": ["dde", "sft"], "objective.beta": [500, 2000.5]}
    cells = [
        {"overrides": {"training.lora": {"rank": 4}}, "label": "lora"},
        {"overrides": {"training.seed": 3}},
    ]
    exclude = [{"objective.method": "sft", "objective.beta": 500}]
    study = plane.post(STUDIES, body(plane, grid=grid, cells=cells, exclude=exclude))
    assert [cell["label"] for cell in study["cells"]] == [
        "dde-beta500",
        "dde-beta2000.5",
        "sft-beta2000.5",
        "lora",
        "seed3",
    ]
    assert [cell["setting"] for cell in study["cells"]][-2:] == ["lora", "dde"]
    settle(plane, study)
    assert cell_jobs(plane, study)["lora"]["training"]["lora"]["rank"] == 4


def test_a_study_of_several_bases_is_compared_with_the_one_it_names(plane):
    plane.post("/v1/models", {"name": "other", "uri": write_base(plane.root / "other")})
    grid = {"model": ["shapes", "other"]}
    error = plane.error(STUDIES, body(plane, grid=grid))
    assert error["param"] == "evaluation.base"
    evaluation = body(plane)["evaluation"]
    study = plane.post(STUDIES, body(plane, grid=grid, evaluation={**evaluation, "base": "other"}))
    assert settle(plane, study)["status"] == "succeeded"
    for each in study["evaluations"] or plane.get(f"{STUDIES}/{study['id']}")["evaluations"]:
        assert plane.get(f"/v1/evaluations/{each}")["base"] == "other"


# ---- refused before anything starts


@pytest.mark.parametrize(
    ("changes", "param", "text"),
    [
        ({"grid": {"objective.bta": [1]}}, "cells.bta1.objective.bta", "cell bta1"),
        ({"grid": {"objective.beta": [500, -1]}}, "cells.beta-1.objective.beta", "-1"),
        ({"grid": {"training.seed": []}}, "grid.training.seed", "at least 1"),
        ({"grid": {}}, "grid", "no cell"),
        ({"grid": {"training.seed": [1, 1]}}, "cells", "'seed1'"),
        ({"grid": {"objective.beta": [5000, 5000.0]}}, "cells", "'beta5000'"),
        ({"cells": [{"overrides": {"objective.method": "dde"}, "label": "again"}]}, "cells", "same job"),
        ({"grid": {"training.seed": list(range(201))}}, "grid", "at most 200 cells, got 201"),
        ({"grid": {"training.seed": list(range(50)), "training.draw_seed": list(range(50))}}, "grid", "2500"),
        ({"grid": {"model": ["nobody"]}}, "cells.nobody.model", "does not exist"),
        ({"grid": {"dataset": ["ds_" + "0" * 24]}}, "cells.dataset1.dataset", "does not exist"),
        ({"grid": {"training.batch_size": [4, 90]}}, "cells.batch_size90.training.batch_size", "90"),
        ({"grid": {"name": ["a"]}}, "grid.name", "set by the study"),
        ({"grid": {"metadata.study": ["a"]}}, "grid.metadata.study", "set by the study"),
        ({"grid": {"model.x": [1]}}, "cells.x1.model.x", "no section"),
        ({"grid": {"training.seed": [1], "training.seed, training.draw_seed": [2]}}, None, "is set twice"),
        ({"grid": {"training.seed; drop": [1]}}, None, "should match pattern"),
        ({"cells": [{"overrides": {}}]}, "cells.0.overrides", "at least 1"),
        ({"exclude": [{"objective.method": "uniform"}]}, "exclude.0", "matches no cell"),
        ({"name": "n" * 60}, "name", "model's name"),
        ({"name": "ajob_" + "0" * 24}, "name", "form of an id"),
        ({"parallel": 0}, "parallel", "greater than or equal to 1"),
        ({"on_failure": "ignore"}, "on_failure", "continue"),
        ({"evaluation": {"prompts_uri": "/nowhere"}}, "evaluation.prompts_uri", "nowhere"),
        ({"evaluation": {"prompts_uri": "x", "colour": 1}}, "evaluation.colour", "colour"),
        ({"unknown": 1}, "unknown", "unknown"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(plane, changes, param, text):
    error = plane.http.post(STUDIES, json=body(plane, **changes))
    assert error.status_code in (400, 404), error.text
    error = error.json()["error"]
    assert param in (None, error["param"]), error
    assert text in error["message"]
    assert plane.get(STUDIES)["data"] == plane.get(JOBS)["data"] == []


def test_a_study_on_a_dataset_of_scorers_waits_for_it_and_warns_of_prompts_that_are_not_held_out(plane):
    made = plane.post("/v1/datasets", generate_body(plane))
    on_made = body(plane, base={**body(plane)["base"], "dataset": made["id"]})
    error = plane.error(STUDIES, on_made, 409)
    assert (error["param"], error["code"]) == ("cells.dde-seed0.dataset", "dataset_not_ready")
    plane.settle()
    warned = "3 prompts of the evaluation made the dataset, too"
    study = plane.post(STUDIES, on_made)
    assert sum(warned in message for message in events(plane, study)) == 1
    plane.settle(10)
    cell = cell_jobs(plane, study)["dde-seed0"]
    assert any(warned in message for message in plane.events(cell["id"]))


def test_a_base_with_a_name_is_refused(plane):
    assert plane.error(STUDIES, body(plane, base=plane.job_body(name="mine")))["param"] == "base.name"


def test_metadata_of_a_base_leaves_room_for_the_studys_own(plane):
    metadata = {f"key{i}": "x" for i in range(15)}
    error = plane.error(STUDIES, body(plane, base=plane.job_body(metadata=metadata)))
    assert error["param"] == "cells.dde-seed0.metadata"
    error = plane.error(STUDIES, body(plane, base=plane.job_body(metadata={"cell": "mine"})))
    assert error["param"] == "base.metadata.cell"
    study = plane.post(STUDIES, body(plane, base=plane.job_body(metadata={"team": "a"})))
    plane.settle(10)
    expected = {"team": "a", "study": study["id"], "cell": "dde-seed0"}
    assert cell_jobs(plane, study)["dde-seed0"]["metadata"] == expected


def test_a_name_that_another_study_or_model_has_is_refused(plane):
    study = plane.post(STUDIES, body(plane))
    assert plane.error(STUDIES, body(plane))["code"] == "name_taken"
    settle(plane, study)
    error = plane.error(STUDIES, body(plane))
    assert (error["param"], error["code"]) == ("cells.dde-seed0.name", "name_taken")


def test_a_repeated_create_starts_one_study(any_plane):
    plane = any_plane
    sent = {"Idempotency-Key": "once"}
    first = plane.post(STUDIES, body(plane), headers=sent)
    assert plane.post(STUDIES, body(plane), headers=sent)["id"] == first["id"]
    assert len(plane.get(STUDIES)["data"]) == 1


def test_a_study_of_200_cells_is_checked_and_created_within_seconds(plane):
    study = plane.post(STUDIES, body(plane, grid={"training.seed": list(range(200))}, parallel=200))
    assert len(study["cells"]) == 200


# ---- failures


def fails_for(method: str):
    def train(spec) -> fakes.RunState:
        return fakes.fails(spec) if spec.objective.method == method else fakes.train(spec)

    return train


def test_a_failed_cell_does_not_stop_the_others(plane):
    plane.launcher.plays["train"] = fails_for("sft")
    done = settle(plane, plane.post(STUDIES, body(plane)))
    assert done["status"] == "succeeded"
    statuses = {cell["label"]: cell["status"] for cell in done["cells"]}
    assert statuses == {
        "dde-seed0": "succeeded",
        "dde-seed1": "succeeded",
        "sft-seed0": "failed",
        "sft-seed1": "failed",
    }
    assert done["cells"][2]["reason"] == "beta must be positive, got -1"
    assert "cell sft-seed0 failed: beta must be positive, got -1" in events(plane, done)
    settings = {each["setting"]: each for each in done["result"]["settings"]}
    assert (settings["sft"]["cells"], settings["sft"]["models"], settings["sft"]["scores"]) == (2, 0, {})
    assert {each["setting"] for each in done["result"]["contrasts"]} == {"dde"}


def test_settings_are_compared_by_the_seeds_that_both_have(plane):
    def train(spec) -> fakes.RunState:
        is_broken = spec.objective.method == "sft" and spec.training.seed == 0
        return fakes.fails(spec) if is_broken else fakes.train(spec)

    plane.launcher.plays["train"] = train
    done = settle(plane, plane.post(STUDIES, body(plane)))
    seeds = {(each["setting"], each["against"]): each["seeds"] for each in done["result"]["contrasts"]}
    assert seeds == {("dde", None): 2, ("sft", None): 1, ("dde", "sft"): 1}


def test_a_study_that_stops_on_failure_cancels_the_rest_and_names_the_cell(plane):
    def train(spec) -> fakes.RunState:
        return fakes.runs(spec) if spec.objective.method == "dde" else fakes.fails(spec)

    plane.launcher.plays["train"] = train
    grid = {"objective.method": ["dde", "sft", "uniform"]}
    done = settle(plane, plane.post(STUDIES, body(plane, grid=grid, on_failure="stop")))
    assert done["status"] == "failed"
    assert done["reason"]["code"] == "cell_failed"
    assert done["reason"]["message"].startswith("cell sft failed: beta")
    assert [cell["status"] for cell in done["cells"]] == ["cancelled", "failed", "waiting"]


def test_a_study_without_any_model_fails(plane):
    plane.launcher.plays["train"] = fakes.fails
    done = settle(plane, plane.post(STUDIES, body(plane)))
    assert (done["status"], done["reason"]["code"]) == ("failed", "no_cell_succeeded")


def test_a_study_whose_evaluation_fails_says_why(plane):
    study = plane.post(STUDIES, body(plane))

    def play(spec) -> fakes.RunState:
        return fakes.fails(spec) if spec.job.startswith("eval_") else evaluate(spec)

    plane.launcher.plays["evaluate"] = play
    done = settle(plane, study)
    assert (done["status"], done["reason"]["code"]) == ("failed", "evaluation_failed")
    assert "beta must be positive" in done["reason"]["message"]


def failed_in_its_evaluation(plane: Plane, **changes) -> dict:
    """A study whose evaluations' drivers die, each time they are started."""

    def play(spec) -> fakes.RunState:
        return fakes.dies(spec) if spec.job.startswith("eval_") else evaluate(spec)

    plane.launcher.plays["evaluate"] = play
    done = settle(plane, plane.post(STUDIES, body(plane, **changes)), looks=2000)
    assert (done["status"], done["reason"]["code"]) == ("failed", "evaluation_failed")
    return done


def test_a_study_whose_evaluation_was_killed_is_resumed_and_trains_nothing_again(any_plane):
    plane = any_plane
    done = failed_in_its_evaluation(plane)
    [killed] = done["evaluations"]
    started = set(plane.launcher.submitted)
    plane.launcher.plays["evaluate"] = evaluate
    answer = plane.post(f"{STUDIES}/{done['id']}/resume", None)
    assert (answer["status"], answer["reason"], answer["finished_at"]) == ("evaluating", None, None)
    again = settle(plane, done)
    assert (again["status"], again["reason"]) == ("succeeded", None)
    assert len(again["result"]["contrasts"]) == 3
    [repeated] = again["evaluations"]
    assert repeated != killed
    assert set(plane.launcher.submitted) - started == {f"{repeated}-evaluate-a1"}
    assert "failed -> evaluating: resumed on request" in events(plane, done)
    error = plane.post(f"{STUDIES}/{done['id']}/resume", None, 409)["error"]
    assert f"{done['id']} has not failed: it is succeeded" in error["message"]


def test_of_several_evaluations_a_resumed_study_repeats_those_that_failed(plane, monkeypatch):
    monkeypatch.setattr(studies, "MODELS_OF_ONE", 2)
    failing: list[str] = []

    def play(spec) -> fakes.RunState:
        if spec.job.startswith("eval_") and (not failing or spec.job in failing):
            failing.append(spec.job)
            return fakes.fails(spec)
        return evaluate(spec)

    plane.launcher.plays["evaluate"] = play
    done = settle(plane, plane.post(STUDIES, body(plane, parallel=1)))
    assert done["status"] == "failed"
    plane.launcher.plays["evaluate"] = evaluate
    plane.post(f"{STUDIES}/{done['id']}/resume", None)
    again = settle(plane, done)
    assert again["status"] == "succeeded"
    kept = [each for each in done["evaluations"] if each not in failing]
    assert len(kept) == 1
    assert kept[0] in again["evaluations"]
    assert not set(failing) & set(again["evaluations"])
    succeeded = plane.get("/v1/evaluations?status=succeeded")["data"]
    assert {each["id"] for each in succeeded} == set(again["evaluations"])


def test_a_study_may_be_resumed_as_often_as_its_evaluation_fails(plane):
    done = failed_in_its_evaluation(plane, grid={"objective.method": ["dde"]})
    seen = set(done["evaluations"])
    for _ in range(2):
        plane.post(f"{STUDIES}/{done['id']}/resume", None)
        done = settle(plane, done, looks=2000)
        assert done["status"] == "failed"
        assert not seen & set(done["evaluations"])
        seen |= set(done["evaluations"])


def test_a_study_that_cannot_be_resumed_says_why(plane):
    done = settle(plane, plane.post(STUDIES, body(plane, name="other")))
    url = f"{STUDIES}/{failed_in_its_evaluation(plane)['id']}"
    with plane.database.write() as session:
        session.execute(
            Job.__table__.update().where(Job.id == done["id"]).values(name="paper", status="running")
        )
    error = plane.post(f"{url}/resume", None, 409)["error"]
    assert error["code"] == "name_taken"
    with plane.database.write() as session:
        session.execute(Job.__table__.update().where(Job.id == done["id"]).values(status="succeeded"))
    model = plane.get(url)["cells"][1]["model"]
    assert plane.http.delete(f"/v1/models/{model}").status_code == 200
    error = plane.post(f"{url}/resume", None, 409)["error"]
    assert error["code"] == "model_not_found"
    assert f"its model {model} was deleted" in error["message"]
    assert plane.get(url)["status"] == "failed"
    plane.launcher.plays["train"] = fakes.fails
    nothing = settle(plane, plane.post(STUDIES, body(plane, name="nothing")))
    error = plane.post(f"{STUDIES}/{nothing['id']}/resume", None, 409)["error"]
    assert "failed before its models were compared" in error["message"]


def test_a_kill_after_every_transaction_of_a_resumed_study_loses_nothing(any_plane, killer):
    plane = any_plane
    done = failed_in_its_evaluation(plane, grid={"objective.method": ["dde"]})
    plane.launcher.plays["evaluate"] = evaluate
    plane.post(f"{STUDIES}/{done['id']}/resume", None)
    killer["on"] = True
    while (seen := plane.get(f"{STUDIES}/{done['id']}"))["status"] == "evaluating":
        try:
            if not plane.reconciler().once():
                plane.clock.now += plane.settings.poll_interval_s
        except Killed:
            plane.clock.now += plane.settings.lock_s + 1
            killer["kind"] = None
        assert killer["kills"] < 50
    assert killer["kills"] >= 2
    assert seen["status"] == "succeeded", seen["reason"]
    assert len(plane.launcher.submitted) == len(set(plane.launcher.submitted))


def test_a_cell_whose_dataset_was_deleted_meanwhile_fails_alone(plane):
    dataset = plane.dataset["id"]
    plane.launcher.plays["encode"] = fakes.runs
    study = plane.post(STUDIES, body(plane, grid={"objective.method": ["dde", "sft"]}, parallel=1))
    plane.settle(10)
    with plane.database.write() as session:
        session.execute(studies.Job.__table__.update().where(Job.kind == "alignment").values(dataset="gone"))
    assert plane.http.delete(f"/v1/datasets/{dataset}").status_code == 200
    [first] = cell_jobs(plane, study)
    [job] = cell_jobs(plane, study).values()
    plane.post(f"{JOBS}/{job['id']}/cancel", None)
    done = settle(plane, study)
    cells = {cell["label"]: cell for cell in done["cells"]}
    assert cells[first]["status"] == "cancelled"
    assert (cells["sft"]["status"], cells["sft"]["job"]) == ("failed", None)
    assert f'dataset "{dataset}" does not exist' in cells["sft"]["reason"]


def test_a_failed_cell_that_is_resumed_while_the_study_runs_is_compared(plane):
    plane.launcher.plays["train"] = fails_for("sft")
    study = plane.post(STUDIES, body(plane, grid={"objective.method": ["sft", "dde"]}, parallel=1))
    while plane.get(f"{STUDIES}/{study['id']}")["cells"][0]["status"] != "failed":
        plane.settle(2)
    plane.launcher.plays["train"] = fakes.train
    plane.post(f"{JOBS}/{cell_jobs(plane, study)['sft']['id']}/resume", None)
    done = settle(plane, study)
    assert [cell["status"] for cell in done["cells"]] == ["succeeded", "succeeded"]


# ---- cancel


def test_a_cancelled_study_cancels_its_cells_and_starts_no_more(any_plane):
    plane = any_plane
    plane.launcher.plays["train"] = fakes.runs
    study = plane.post(STUDIES, body(plane))
    plane.settle(40)
    plane.post(f"{STUDIES}/{study['id']}/cancel", None)
    done = settle(plane, study)
    assert done["status"] == "cancelled"
    assert {job["status"] for job in cell_jobs(plane, study).values()} == {"cancelled"}
    assert [cell["status"] for cell in done["cells"]] == ["cancelled"] * 2 + ["waiting"] * 2
    assert plane.http.post(f"{STUDIES}/{study['id']}/cancel").status_code == 200


def test_a_study_that_is_cancelled_while_it_evaluates_cancels_its_evaluation(plane):
    plane.launcher.plays["evaluate"] = lambda spec: (
        fakes.runs(spec) if spec.job.startswith("eval_") else evaluate(spec)
    )
    study = plane.post(STUDIES, body(plane))
    while not plane.get("/v1/evaluations")["data"]:
        plane.settle(10)
    plane.post(f"{STUDIES}/{study['id']}/cancel", None)
    done = settle(plane, study)
    assert done["status"] == "cancelled"
    assert {each["status"] for each in plane.get("/v1/evaluations")["data"]} == {"cancelled"}
    assert {cell["status"] for cell in done["cells"]} == {"succeeded"}


def test_a_study_that_has_ended_cannot_be_cancelled(plane):
    done = settle(plane, plane.post(STUDIES, body(plane)))
    plane.post(f"{STUDIES}/{done['id']}/cancel", None, 409)


# ---- kills, replicas, projects


class Killed(BaseException):
    """The process of the control plane is gone."""


@pytest.fixture
def killer(monkeypatch):
    """While it is on, kills the reconciler right after every transaction of a study's review."""
    state = {"on": False, "kind": None, "kills": 0}
    write, take = Database.write, Reconciler.take

    @contextmanager
    def killing(self, *args, **kwargs):
        with write(self, *args, **kwargs) as session:
            yield session
        if state["on"] and state["kind"] == "study":
            state["kills"] += 1
            raise Killed

    def taking(self):
        state["kind"] = None
        job = take(self)
        state["kind"] = job and job.kind
        return job

    monkeypatch.setattr(Database, "write", killing)
    monkeypatch.setattr(Reconciler, "take", taking)
    return state


def test_a_kill_after_every_transaction_loses_nothing_and_starts_nothing_twice(any_plane, killer):
    plane = any_plane
    grid = {"objective.method": ["dde", "sft"]}
    undisturbed = settle(plane, plane.post(STUDIES, body(plane, name="undisturbed", grid=grid)))
    expected = len(plane.launcher.submitted)
    study = plane.post(STUDIES, body(plane, name="killed", grid=grid))
    killer["on"] = True
    while (done := plane.get(f"{STUDIES}/{study['id']}"))["status"] in ("running", "evaluating"):
        try:
            if not plane.reconciler().once():
                plane.clock.now += plane.settings.poll_interval_s
        except Killed:
            plane.clock.now += plane.settings.lock_s + 1
            killer["kind"] = None
        assert killer["kills"] < 200
    assert killer["kills"] >= 8, "two cells, an evaluation, a report: each is created, then recorded"
    assert done["status"] == "succeeded", done["reason"]
    assert len(plane.launcher.submitted) == len(set(plane.launcher.submitted)) == 2 * expected
    assert len(cell_jobs(plane, done)) == 2
    made = len(undisturbed["evaluations"])
    assert len(done["evaluations"]) == made
    assert len(plane.get("/v1/evaluations")["data"]) == 2 * made
    assert done["result"]["contrasts"] == undisturbed["result"]["contrasts"]
    seen = events(plane, done)
    assert len(seen) == len(set(seen)), seen


def test_a_replica_whose_lock_has_expired_starts_no_cell(each_plane):
    plane = each_plane
    study = plane.post(STUDIES, body(plane))
    plane.clock.now = time.time() + 1
    job = plane.reconciler().take()
    assert job is not None
    assert job.id == study["id"]
    plane.clock.now += plane.settings.lock_s + 1
    other = plane.reconciler().take()
    assert other is not None
    review = studies.StudyReview(job, plane.database, plane.settings, plane.clock.now)
    with pytest.raises(studies.StaleToken):
        review.decide()
    assert cell_jobs(plane, study) == {}


def test_a_cancel_during_a_review_keeps_the_next_cell_from_starting(plane):
    study = plane.post(STUDIES, body(plane))
    plane.clock.now = time.time() + 1
    job = plane.reconciler().take()
    assert job is not None
    plane.post(f"{STUDIES}/{study['id']}/cancel", None)
    update = studies.StudyReview(job, plane.database, plane.settings, plane.clock.now).decide()
    assert cell_jobs(plane, study) == {}
    plane.reconciler().apply(update)
    assert settle(plane, study)["status"] == "cancelled"


def test_a_study_and_all_it_makes_belong_to_its_project(any_plane):
    plane = any_plane
    team = bearer(new_key(plane, "team-a")["key"])
    plane.post("/v1/models", {"name": "shapes", "uri": str(plane.root / "base")}, headers=team)
    ours = plane.dataset
    dataset = plane.post("/v1/datasets", {"name": "d", "uri": ours["uri"]}, headers=team)
    request = body(plane)
    error = plane.post(STUDIES, request, 404, headers=team)["error"]
    assert error["param"] == "cells.dde-seed0.dataset"
    request["base"]["dataset"] = dataset["id"]
    study = plane.post(STUDIES, request, headers=team)
    plane.settle(400)
    done = plane.get(f"{STUDIES}/{study['id']}", headers=team)
    assert done["status"] == "succeeded", done["reason"]
    plane.get(f"{STUDIES}/{study['id']}", 404)
    assert plane.get(STUDIES)["data"] == plane.get(JOBS)["data"] == plane.get("/v1/evaluations")["data"] == []
    assert len(plane.get(JOBS, headers=team)["data"]) == 4
    root = layout.project_root(plane.app_settings.storage_uri, "team-a")
    assert done["result"]["report"] == f"{root}/studies/{study['id']}/report.json"
    with plane.database.read() as session:
        assert set(session.scalars(select(Job.project))) == {"team-a"}


def test_an_id_of_a_job_is_no_study_and_the_other_way_round(plane):
    study = plane.post(STUDIES, body(plane))
    job = plane.job()
    error = plane.get(f"{STUDIES}/{job['id']}", 404)["error"]
    assert error["code"] == "study_not_found"
    plane.get(f"{JOBS}/{study['id']}", 404)
    assert study["id"] not in {each["id"] for each in plane.get(JOBS)["data"]}


def test_the_base_of_an_unfinished_study_cannot_be_deleted(plane):
    study = plane.post(STUDIES, body(plane))
    answer = plane.http.delete("/v1/models/shapes")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "in_use")
    assert study["id"] in answer.json()["error"]["message"]
