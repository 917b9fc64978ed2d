"""Datasets that scorers make: requested, made by a run, used, cancelled and deleted."""

from __future__ import annotations

import pytest

from dde_core.scorers.kinds import KINDS
from services.stages import layout
from services.storage import files
from tests.services.control.conftest import Plane, write_pairs
from tests.services.control.fakes import dies, fails, make_pairs, runs
from tests.services.control.test_access import bearer, new_key
from tests.services.control.test_scorers import insert

DATASETS = "/v1/datasets"


def generate_body(plane: Plane, **fields) -> dict:
    wanted = {
        "model": "shapes",
        "prompts_uri": str(plane.root / "prompts.txt"),
        "num_prompts": 3,
        "scorers": {"taste": 1.0},
        "sample": {"height": 32, "width": 32},
    }
    return {"name": "drawn", "generate": wanted | fields}


def relabel_body(dataset_id: str, **fields) -> dict:
    return {"name": "labeled", "relabel": {"dataset": dataset_id, "scorer": "match"} | fields}


def readable_pairs(plane: Plane) -> dict:
    """A registered dataset whose captions the built-in scorers can read."""
    captions = ["a red cross"] * 10
    return plane.post(DATASETS, {"name": "d", "uri": write_pairs(plane.root / "mine", caption=captions)})


def read(plane: Plane, dataset: dict) -> dict:
    return plane.get(f"{DATASETS}/{dataset['id']}")


def events(plane: Plane, dataset: dict) -> list[str]:
    return [each["message"] for each in plane.get(f"{DATASETS}/{dataset['id']}/events")["data"]]


def test_a_dataset_is_generating_at_once_and_ready_with_counts_when_its_run_has_ended(any_plane):
    plane = any_plane
    created = plane.post(DATASETS, generate_body(plane, images_per_prompt=2, margin=0.5, seed=9))
    assert created["status"] == "generating"
    assert (created["digest"], created["counts"], created["example"], created["result"]) == (None,) * 4
    assert created["generate"]["margin"] == 0.5
    assert created["job"].startswith("djob_")
    assert plane.get(DATASETS)["data"] == [created]
    plane.settle()
    done = read(plane, created)
    assert (done["status"], done["reason"]) == ("ready", None)
    assert done["counts"]["pairs"] == 8
    assert done["example"]["caption"] == "a red cross"
    assert done["result"]["images"] == 36
    assert done["digest"] == done["result"]["digest"]
    spec = plane.launcher.specs[f"{created['job']}-generate-a1"]
    assert spec.generate.seed == 9
    assert [scorer.name for scorer in spec.scorers] == ["taste"]
    storage = plane.app_settings.storage_uri
    assert spec.output == f"{storage}/pairs/{created['id']}"
    assert done["uri"] == f"{storage}/pairs/{created['id']}/pairs"
    assert events(plane, created)[0] == "created: shapes draws 2 images of 3 prompts"
    assert "step 2" in events(plane, created)
    assert plane.get(DATASETS)["data"] == [done]


def test_a_job_trains_on_a_dataset_that_scorers_made(any_plane):
    plane = any_plane
    made = plane.post(DATASETS, generate_body(plane))
    plane.settle()
    job = plane.job(dataset=made["id"])
    plane.settle(60)
    assert plane.get(f"/v1/alignment/jobs/{job['id']}")["status"] == "succeeded"
    spec = plane.launcher.specs[f"{job['id']}-encode-a1"]
    assert spec.source.uri == read(plane, made)["uri"]
    assert spec.source_digest == read(plane, made)["digest"]
    assert f"{plane.app_settings.storage_uri}/pairs" in spec.sources.allowed


@pytest.mark.parametrize("state", ["waiting", "running", "failed"])
def test_a_job_on_a_dataset_that_is_not_ready_is_refused_by_name(any_plane, state):
    plane = any_plane
    plane.launcher.plays["generate"] = fails if state == "failed" else runs
    made = plane.post(DATASETS, generate_body(plane))
    if state != "waiting":
        plane.settle()
    error = plane.error("/v1/alignment/jobs", plane.job_body(dataset=made["id"]), 409)
    assert (error["param"], error["code"]) == ("dataset", "dataset_not_ready")
    assert made["id"] in error["message"]
    assert ("beta must be positive" if state == "failed" else made["job"]) in error["message"]
    error = plane.error(DATASETS, relabel_body(made["id"]), 409)
    assert (error["param"], error["code"]) == ("relabel.dataset", "dataset_not_ready")


def test_a_run_that_fails_gives_its_reason_and_no_counts(any_plane):
    plane = any_plane
    plane.launcher.plays["generate"] = fails
    made = plane.post(DATASETS, generate_body(plane))
    plane.settle()
    failed = read(plane, made)
    assert failed["status"] == "failed"
    assert failed["reason"] == {
        "code": "ConfigError", "message": "beta must be positive, got -1", "param": "beta",
    }  # fmt: skip
    assert (failed["counts"], failed["digest"]) == (None, None)


def test_a_driver_that_dies_is_followed_by_another_attempt(any_plane):
    plane = any_plane
    plane.launcher.plays["generate"] = dies
    made = plane.post(DATASETS, generate_body(plane))
    plane.settle(20)
    plane.launcher.plays["generate"] = make_pairs
    plane.settle(60)
    assert read(plane, made)["status"] == "ready"
    assert f"{made['job']}-generate-a2" in plane.launcher.submitted
    specs = [plane.launcher.specs[f"{made['job']}-generate-a{i}"] for i in (1, 2)]
    assert specs[0].output == specs[1].output, "what is committed is kept"


def test_a_run_can_be_cancelled_and_its_dataset_then_deleted(each_plane):
    plane = each_plane
    plane.launcher.plays["generate"] = runs
    made = plane.post(DATASETS, generate_body(plane))
    plane.settle()
    refused = plane.http.delete(f"{DATASETS}/{made['id']}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
    assert plane.http.delete("/v1/models/shapes").status_code == 409, "the run needs it"
    assert plane.post(f"{DATASETS}/{made['id']}/cancel", None)["status"] == "generating"
    plane.settle()
    assert read(plane, made)["reason"]["code"] == "cancelled"
    assert plane.launcher.states[f"{made['job']}-generate-a1"] == "stopped"
    assert plane.http.delete(f"{DATASETS}/{made['id']}").status_code == 200
    assert plane.http.delete("/v1/models/shapes").status_code == 200


def test_a_dataset_that_exists_cannot_be_cancelled(plane):
    error = plane.error(f"{DATASETS}/{plane.dataset['id']}/cancel", None, 409)
    assert error["code"] == "dataset_ready"
    assert events(plane, plane.dataset) == []
    made = plane.post(DATASETS, generate_body(plane))
    plane.settle()
    assert plane.error(f"{DATASETS}/{made['id']}/cancel", None, 409)["code"] == "job_succeeded"


def test_the_files_of_a_made_dataset_are_deleted_with_it_and_those_of_others_stay(any_plane):
    plane = any_plane
    registered = plane.dataset
    made, other = (plane.post(DATASETS, generate_body(plane)) for _ in range(2))
    plane.settle(60)
    folders = [layout.made_folder(plane.app_settings.storage_uri, each["id"]) for each in (made, other)]
    assert all(files.exists(folder) for folder in folders)
    for each in (made, registered):
        assert plane.http.delete(f"{DATASETS}/{each['id']}").status_code == 200
    assert [files.exists(folder) for folder in folders] == [False, True]
    assert files.exists(registered["uri"])


def test_a_dataset_is_labeled_anew_from_its_files_as_they_were_registered(any_plane):
    plane = any_plane
    source = readable_pairs(plane)
    made = plane.post(DATASETS, relabel_body(source["id"], margin=0.2))
    assert (made["status"], made["relabel"]["margin"]) == ("generating", 0.2)
    refused = plane.http.delete(f"{DATASETS}/{source['id']}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
    plane.settle()
    assert read(plane, made)["status"] == "ready"
    spec = plane.launcher.specs[f"{made['job']}-relabel-a1"]
    assert (spec.source.uri, spec.source_digest) == (source["uri"], source["digest"])
    assert spec.relabel.scorer == "match"
    assert plane.http.delete(f"{DATASETS}/{source['id']}").status_code == 200, "the copy needs it no more"


def test_a_made_dataset_can_be_labeled_anew(plane, monkeypatch):
    made = plane.post(DATASETS, generate_body(plane))
    plane.settle()
    again = plane.post(DATASETS, relabel_body(made["id"]))
    plane.settle()
    assert read(plane, again)["status"] == "ready"
    assert plane.launcher.specs[f"{again['job']}-relabel-a1"].source.uri == read(plane, made)["uri"]


def test_a_repeated_request_makes_one_dataset(any_plane):
    plane = any_plane
    sent = {"Idempotency-Key": "once"}
    first, again = (plane.post(DATASETS, generate_body(plane), headers=sent) for _ in range(2))
    assert first == again
    assert len(plane.get(DATASETS)["data"]) == 1


def test_another_project_reads_neither_a_made_dataset_nor_its_files(any_plane):
    plane = any_plane
    made = plane.post(DATASETS, generate_body(plane))
    plane.settle()
    team = bearer(new_key(plane, "team-a")["key"])
    for path in ("", "/events"):
        plane.get(f"{DATASETS}/{made['id']}{path}", 404, headers=team)
    plane.post(DATASETS, relabel_body(made["id"]), 404, headers=team)
    uri = read(plane, made)["uri"]
    error = plane.post(DATASETS, {"name": "x", "uri": uri}, 403, headers=team)["error"]
    assert error["code"] == "other_project"
    plane.post("/v1/models", {"name": "shapes", "uri": str(plane.root / "base")}, headers=team)
    theirs = plane.post(DATASETS, generate_body(plane), headers=team)
    plane.settle()
    done = plane.get(f"{DATASETS}/{theirs['id']}", headers=team)
    root = layout.project_root(plane.app_settings.storage_uri, "team-a")
    assert (done["status"], done["uri"]) == ("ready", f"{root}/pairs/{theirs['id']}/pairs")


def test_the_files_of_a_made_dataset_are_not_registered_again(plane):
    made = plane.post(DATASETS, generate_body(plane))
    plane.settle()
    uri = read(plane, made)["uri"]
    for each in (uri, files.local_path(uri), f"{plane.app_settings.storage_uri}/pairs"):
        error = plane.error(DATASETS, {"name": "again", "uri": str(each)})
        assert (error["param"], error["code"]) == ("uri", "made_by_scorers")


# ---- registered scorers


def test_registered_scorers_make_pairs_by_name_or_id_and_are_held_until_the_run_ends(any_plane):
    plane = any_plane
    pick = insert(plane, "pick", "pickscore")
    made = plane.post(DATASETS, generate_body(plane, scorers={"taste": 2.0, pick.id: 1.0}))
    assert made["generate"]["scorers"] == {"taste": 2.0, "pick": 1.0}
    labeled = plane.post(DATASETS, relabel_body(readable_pairs(plane)["id"], scorer=pick.id))
    assert labeled["relabel"]["scorer"] == "pick"
    refused = plane.http.delete("/v1/scorers/pick")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
    plane.settle()
    assert [read(plane, each)["status"] for each in (made, labeled)] == ["ready", "ready"]
    generate = plane.launcher.specs[f"{made['job']}-generate-a1"]
    assert {scorer.name for scorer in generate.scorers} == set(generate.generate.scorers) == {"taste", "pick"}
    assert pick in generate.scorers
    assert plane.launcher.specs[f"{labeled['job']}-relabel-a1"].scorers == [pick]
    assert plane.http.delete("/v1/scorers/pick").status_code == 200


def test_a_scorer_of_another_project_or_one_given_by_name_and_id_is_refused(plane):
    theirs = insert(plane, "theirs", "clip", "team-a")
    for named in ("theirs", theirs.id):
        error = plane.error(DATASETS, generate_body(plane, scorers={named: 1.0}), 404)
        assert (error["param"], error["code"]) == ("generate.scorers", "scorer_not_found")
    pick = insert(plane, "pick", "pickscore")
    error = plane.error(DATASETS, generate_body(plane, scorers={"pick": 1.0, pick.id: 1.0}))
    assert error["param"] == "generate.scorers"
    assert f"must not repeat, got 'pick' and its id '{pick.id}'" in error["message"]


# ---- prompts that are not held out


@pytest.mark.parametrize(("shared", "warned"), [(["a green square"], True), ([], False)])
def test_a_job_that_is_evaluated_on_prompts_of_its_dataset_warns(any_plane, shared, warned):
    plane = any_plane
    made = plane.post(DATASETS, generate_body(plane))
    plane.settle()
    (plane.root / "held_out.txt").write_text("\n".join(["a blue square", "a red square", *shared]))
    evaluation = {"prompts_uri": str(plane.root / "held_out.txt"), "num_prompts": 2 + len(shared)}
    job = plane.job(dataset=made["id"], evaluation=evaluation)
    expected = (
        "1 prompts of the evaluation made the dataset, too, such as 'a green square': on them nothing is "
        "held out; set evaluation.prompts_uri to others"
    )
    found = [message for message in plane.events(job["id"]) if "held out" in message]
    assert found == ([expected] if warned else [])


def test_a_job_says_so_if_the_datasets_prompts_cannot_be_compared_any_more(plane):
    made = plane.post(DATASETS, generate_body(plane))
    plane.settle()
    (plane.root / "held_out.txt").write_text("a blue square\na red square\n")
    (plane.root / "prompts.txt").unlink()
    evaluation = {"prompts_uri": str(plane.root / "held_out.txt"), "num_prompts": 2}
    job = plane.job(dataset=made["id"], evaluation=evaluation)
    assert any("has changed since the dataset was made of it" in each for each in plane.events(job["id"]))


# ---- bad input


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"model": "nobody"}, 404, "generate.model", "does not exist"),
        ({"scorers": {"nobody": 1.0}}, 404, "generate.scorers", 'scorer "nobody" does not exist'),
        ({"scorers": {}}, 400, "generate.scorers", "at least 1 item"),
        ({"scorers": {"taste": 0}}, 400, "generate.scorers.taste", "greater than 0"),
        ({"images_per_prompt": 1}, 400, "generate.images_per_prompt", "greater than or equal to 2"),
        ({"images_per_prompt": 17}, 400, "generate.images_per_prompt", "less than or equal to 16"),
        ({"margin": -0.1}, 400, "generate.margin", "greater than or equal to 0"),
        ({"keep": "best"}, 400, "generate.keep", "best_worst"),
        ({"num_prompts": 4}, 400, "generate.prompts_uri", "has 3 prompts, generate.num_prompts requires 4"),
        ({"prompts_uri": "/nowhere/prompts.txt"}, 404, "generate.prompts_uri", "does not exist"),
        ({"sample": {"height": 64, "width": 64}}, 400, "generate.scorers", "height must be 32"),
        ({"seed": -1}, 400, "generate.seed", "greater than or equal to 0"),
    ],
)
def test_a_request_that_would_fail_is_refused_naming_the_field(plane, fields, status, param, words):
    error = plane.error(DATASETS, generate_body(plane, **fields), status)
    assert error["param"] == param
    assert words in error["message"]
    assert plane.get(DATASETS)["data"] == []


def test_prompts_that_the_scorer_cannot_read_are_refused(plane):
    (plane.root / "prompts.txt").write_text("a red cross\nan oil painting of Rome\na green square\n")
    error = plane.error(DATASETS, generate_body(plane))
    assert error["param"] == "generate.scorers"
    assert "taste cannot score" in error["message"]
    assert "an oil painting of Rome" in error["message"]


def test_a_prompt_that_no_dataset_may_have_is_refused(plane):
    (plane.root / "prompts.txt").write_text("a red cross\n" + "a" * 10_001 + "\na green square\n")
    error = plane.error(DATASETS, generate_body(plane, scorers={"fidelity": 1.0}))
    assert "prompt 2 of" in error["message"]
    assert "10001 characters, at most 10000" in error["message"]


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.level != "image"])
def test_a_scorer_of_whole_sets_is_refused_by_name(plane, kind):
    insert(plane, "of-sets", kind)
    error = plane.error(DATASETS, generate_body(plane, scorers={"taste": 1, "of-sets": 1}))
    assert (error["param"], error["code"]) == ("generate.scorers", "scorer_not_of_images")
    assert "'of-sets'" in error["message"]
    error = plane.error(DATASETS, relabel_body(readable_pairs(plane)["id"], scorer="of-sets"))
    assert (error["param"], error["code"]) == ("relabel.scorer", "scorer_not_of_images")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"dataset": "ds_nothing"}, 404, "relabel.dataset"),
        ({"dataset": "\0"}, 404, "relabel.dataset"),
        ({"scorer": "nobody"}, 404, "relabel.scorer"),
        ({"margin": -1}, 400, "relabel.margin"),
        ({"background": "pink"}, 400, "relabel.background"),
    ],
)
def test_a_relabeling_that_would_fail_is_refused_naming_the_field(any_plane, fields, status, param):
    body = relabel_body(readable_pairs(any_plane)["id"], **fields)
    assert any_plane.error(DATASETS, body, status)["param"] == param


def test_captions_that_the_scorer_cannot_read_are_refused(plane):
    error = plane.error(DATASETS, relabel_body(plane.dataset["id"]))
    assert (error["param"], "match cannot score" in error["message"]) == ("relabel.scorer", True)


@pytest.mark.parametrize("ways", [(), ("uri", "generate"), ("generate", "relabel")])
def test_a_dataset_has_one_origin(plane, ways):
    whole = {"uri": write_pairs(plane.root / "pairs"), **generate_body(plane), **relabel_body("ds_1")}
    error = plane.error(DATASETS, {"name": "d"} | {way: whole[way] for way in ways})
    assert "give one of uri, generate, relabel" in error["message"]


@pytest.mark.parametrize("field", [{"columns": {"caption": "prompt"}}, {"split": "train"}])
def test_what_only_files_have_is_refused_beside_generate(plane, field):
    error = plane.error(DATASETS, generate_body(plane) | field)
    assert error["param"] == next(iter(field))
    assert "is not read beside generate" in error["message"]
