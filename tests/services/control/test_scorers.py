"""Scorers in the registry: proven when they are registered, named by jobs, kept in use, deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from services.api.records import ScorerRecord
from services.artifacts import scorers
from services.artifacts.scorers import BUILT_IN
from services.control.tables import Job, Scorer, new_id
from services.settings import Settings
from services.stages import layout
from services.storage import files
from tests.services.control.conftest import Plane, make_plane
from tests.services.control.fakes import fails, train
from tests.services.control.test_access import bearer, new_key
from tests.support.scorers import write_tiny

SCORERS = "/v1/scorers"
JOBS = "/v1/alignment/jobs"
NAMES = ["match", "taste", "fidelity"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[str, str | None]]:
    """A tiny checkpoint and processor of some kinds."""
    folder = tmp_path_factory.mktemp("checkpoints")
    kinds = ("clip", "pickscore", "hps", "imagereward")
    made = {kind: write_tiny(kind, folder / kind) for kind in kinds}
    return {kind: (str(first), second and str(second)) for kind, (first, second) in made.items()}


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """A plane for requests that are refused: they leave nothing behind."""
    folder = tmp_path_factory.mktemp("steady")
    yield from make_plane(folder, f"sqlite:///{folder}/dde.db")


def body(checkpoints, kind: str, name: str | None = None, **fields) -> dict:
    uri, processor = checkpoints[kind]
    files_of = {"uri": uri} | ({"processor": processor} if processor else {})
    return {"name": name or kind, "kind": kind, **files_of, **fields}


def names(plane: Plane, **kwargs) -> list[str]:
    return [scorer["name"] for scorer in plane.get(SCORERS, **kwargs)["data"]]


def insert(plane: Plane, name: str, kind: str, project: str = "default") -> ScorerRecord:
    """A registered scorer, without the proof of its files, which takes seconds."""
    record = ScorerRecord(
        id=new_id("scorer"), name=name, kind=kind, uri="file:///nowhere", digest=kind, created_at=1
    )
    with plane.database.write(project) as session:
        session.add(Scorer(**record.model_dump()))
    return record


# ---- registered


def test_a_scorer_is_registered_found_listed_and_deleted(any_plane, checkpoints):
    plane = any_plane
    request = body(checkpoints, "hps", "hps-v2.1", resize="aliased")
    made = plane.post(SCORERS, request, headers={"Idempotency-Key": "k"})
    assert plane.post(SCORERS, request, headers={"Idempotency-Key": "k"}) == made
    assert made["id"].startswith("scorer_")
    assert (made["object"], made["kind"], made["resize"]) == ("scorer", "hps", "aliased")
    assert (made["level"], made["scale"]) == ("image", "cosine, -1 to 1")
    assert made["uri"] == files.as_uri(request["uri"])
    assert made["digest"] == scorers.digest_of(request["uri"], request["processor"])
    assert plane.get(f"{SCORERS}/hps-v2.1") == plane.get(f"{SCORERS}/{made['id']}") == made
    root = plane.app_settings.storage_uri
    assert scorers.find(root, "hps-v2.1").digest == made["digest"]
    assert names(plane) == ["hps-v2.1", *NAMES]
    again = plane.error(SCORERS, request)
    assert (again["param"], again["code"]) == ("name", "name_taken")
    assert made["id"] in again["message"]
    deleted = plane.http.delete(f"{SCORERS}/hps-v2.1")
    assert deleted.json() == {"id": "hps-v2.1", "object": "scorer", "deleted": True}
    missing = plane.get(f"{SCORERS}/hps-v2.1", 404)["error"]
    assert (missing["param"], missing["code"]) == ("id", "scorer_not_found")
    assert not files.exists(layout.scorer_record_uri(root, "hps-v2.1"))
    assert Path(request["uri"]).exists(), "its files stay"


def test_lists_end_with_the_built_in_scorers_and_have_pages(each_plane):
    made = [insert(each_plane, f"s{i}", "clip") for i in range(3)]
    found = []
    after = ""
    while page := each_plane.get(f"{SCORERS}?limit=2{after}")["data"]:
        found += page
        after = f"&after={page[-1]['id']}"
    assert [each["name"] for each in found] == ["s2", "s1", "s0", *NAMES]
    assert each_plane.get(f"{SCORERS}?limit=6")["has_more"] is False
    assert each_plane.get(f"{SCORERS}?limit=5")["has_more"] is True
    assert each_plane.get(f"{SCORERS}/{made[0].id}")["name"] == "s0"
    assert each_plane.get(f"{SCORERS}?after=nothing", 404)["error"]["param"] == "after"


def test_the_built_in_scorers_are_in_every_project_and_cannot_be_deleted(any_plane):
    team = bearer(new_key(any_plane, "team-a")["key"])
    assert names(any_plane) == names(any_plane, headers=team) == NAMES
    match = any_plane.get(f"{SCORERS}/match")
    assert (match["id"], match["uri"], match["kind"]) == ("scorer_match", None, "match")
    for name in ("match", "scorer_match"):
        error = any_plane.http.delete(f"{SCORERS}/{name}", headers=team)
        assert (error.status_code, error.json()["error"]["code"]) == (409, "built_in")
        assert "scorer 'match' is built in and cannot be deleted" in error.json()["error"]["message"]


def test_two_projects_have_scorers_of_one_name_and_neither_sees_the_others(any_plane):
    plane = any_plane
    team = bearer(new_key(plane, "team-a")["key"])
    theirs = insert(plane, "ours", "clip", "team-a")
    assert names(plane) == NAMES
    assert plane.get(f"{SCORERS}/ours", headers=team)["id"] == theirs.id
    plane.get(f"{SCORERS}/{theirs.id}", 404)
    assert plane.http.delete(f"{SCORERS}/ours").status_code == 404
    insert(plane, "ours", "clip")
    assert plane.get(f"{SCORERS}/ours")["id"] != theirs.id
    mine = plane.job_body(evaluation=evaluation(plane, "ours"))
    del mine["dataset"]
    other = new_key(plane, "team-b")["key"]
    error = plane.post(JOBS, {**mine, "dataset": "ds_x"}, 404, headers=bearer(other))["error"]
    assert error["message"] == 'evaluation.scorers.0: scorer "ours" does not exist'


# ---- refused


@pytest.mark.parametrize(
    ("fields", "status", "param", "code", "message"),
    [
        ({"name": "match"}, 400, "name", "name_taken", "name: belongs to a built-in scorer, got 'match'"),
        ({"name": "scorer_taste"}, 400, "name", "name_taken", "name: belongs to a built-in scorer"),
        ({"name": "scorer_" + "0" * 24}, 400, "name", "invalid_value", "must not have the form of an id"),
        ({"name": "held_out_accuracy"}, 400, "name", "invalid_value", "must not begin with held_out_"),
        ({"name": "../up"}, 400, "name", "invalid_value", "String should match pattern"),
        ({"kind": "match"}, 400, "kind", "invalid_value", "Input should be 'clip', 'pickscore'"),
        ({"kind": "mps"}, 400, "kind", "invalid_value", 'got "mps"'),
        ({"resize": "aliased"}, 400, "resize", "invalid_value", "only the kind hps has a choice"),
        ({"uri": "{root}/nowhere"}, 404, "uri", "not_found", "'{root}/nowhere' does not exist"),
        ({"processor": "{root}/no"}, 404, "processor", "not_found", "processor: uri '{root}/no' does not"),
        ({"uri": "gopher://x/y"}, 400, "uri", "invalid_value", "'gopher://x/y' cannot be opened"),
        ({"uri": "{root}/base"}, 400, "uri", "unusable_scorer", "lacks config.json"),
    ],
    ids=lambda each: json.dumps(each) if isinstance(each, dict) else "",
)
def test_a_scorer_with_an_unusable_field_is_refused_naming_it(
    steady, checkpoints, fields, status, param, code, message
):
    root = str(steady.root)
    fields = {name: value.format(root=root) for name, value in fields.items()}
    error = steady.error(SCORERS, body(checkpoints, "clip") | fields, status)
    assert (error["param"], error["code"]) == (param, code), error
    assert message.format(root=root) in error["message"]
    assert names(steady) == NAMES


@pytest.mark.parametrize(
    ("kind", "of", "message"),
    [
        ("clip", "imagereward", "lacks config.json"),
        ("hps", "clip", "is not a scorer of kind hps: "),
        ("imagereward", "hps", "is not a scorer of kind imagereward: "),
        ("aesthetic", "clip", "processor must be the CLIP folder"),
    ],
)
def test_files_of_another_kind_are_refused_naming_the_first_difference(
    steady, checkpoints, kind, of, message
):
    uri, _ = checkpoints[of]
    error = steady.error(SCORERS, {"name": "wrong", "kind": kind, "uri": uri})
    assert (error["param"], error["code"]) == ("uri", "unusable_scorer")
    assert f"uri {uri!r} is not a scorer of kind {kind}: " in error["message"]
    assert message in error["message"]


def test_a_checkpoint_without_its_tokenizer_or_with_another_shape_is_refused(steady, checkpoints, tmp_path):
    uri, _ = checkpoints["pickscore"]
    error = steady.error(SCORERS, {"name": "p", "kind": "pickscore", "uri": uri})
    assert error["code"] == "unusable_scorer"
    assert "lacks preprocessor_config.json" in error["message"]
    clip = shutil.copytree(checkpoints["clip"][0], tmp_path / "clip")
    for name in ("tokenizer.json", "vocab.json"):
        (clip / name).unlink(missing_ok=True)
    allow = steady.root / "clip"
    shutil.copytree(clip, allow)
    error = steady.error(SCORERS, {"name": "p", "kind": "clip", "uri": str(allow)})
    assert "vocab.json" in error["message"]
    weights = load_file(allow / "model.safetensors")
    weights["logit_scale"] = weights["logit_scale"].repeat(2)
    shutil.copytree(checkpoints["clip"][0], allow, dirs_exist_ok=True)
    save_file(weights, allow / "model.safetensors", metadata={"format": "pt"})
    error = steady.error(SCORERS, {"name": "p", "kind": "clip", "uri": str(allow)})
    assert "model.safetensors: 'logit_scale' must have shape [], got [2]" in error["message"]


# ---- used


def evaluation(plane: Plane, *used: str, **fields) -> dict:
    return {
        "prompts_uri": str(plane.root / "prompts.txt"),
        "num_prompts": 2,
        "scorers": list(used),
        **fields,
    }


@pytest.mark.parametrize("own", [False, True])
def test_a_request_names_its_scorers_by_name(steady, own):
    made = insert(steady, new_id("named"), "clip") if own else BUILT_IN["taste"]
    by_id = evaluation(steady, made.id)
    gate = {"alias": "live", "scorer": made.id}
    message = f"scorers.0: must be the name of a scorer, got the id of {made.name!r}: {made.id!r}"
    for path, request, prefix in [
        (JOBS, steady.job_body(evaluation=by_id, promote_if=gate), "evaluation."),
        ("/v1/evaluations", steady.evaluation_body(scorers=[made.id]), ""),
        ("/v1/scores", {"images": ["a"], "prompts": ["p"], "scorers": [made.id]}, ""),
    ]:
        error = steady.error(path, request)
        assert error["param"] == f"{prefix}scorers.0"
        assert error["message"] == prefix + message


def test_a_job_keeps_the_scorers_it_was_created_with(any_plane):
    plane = any_plane
    made = insert(plane, "ours", "clip")
    plane.launcher.plays["train"] = fails
    job = plane.job(evaluation=evaluation(plane, "ours", "match"))
    refused = plane.http.delete(f"{SCORERS}/ours")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
    assert job["id"] in refused.json()["error"]["message"]
    plane.settle(80)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "failed"
    assert plane.http.delete(f"{SCORERS}/ours").status_code == 200
    insert(plane, "ours", "aesthetic")
    plane.launcher.plays["train"] = train
    plane.post(f"{JOBS}/{job['id']}/resume", None)
    plane.settle(80)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "succeeded"
    for stage, attempt in (("train", 2), ("evaluate", 1)):
        spec = plane.launcher.specs[f"{job['id']}-{stage}-a{attempt}"]
        assert [(each.id, each.digest) for each in spec.scorers] == [
            (made.id, "clip"),
            ("scorer_match", "match"),
        ]
        assert list(spec.scorer_files()) == ["file:///nowhere"]


def test_an_evaluation_holds_its_scorers_until_it_ends(any_plane):
    plane = any_plane
    record = insert(plane, "ours", "drift")
    request = plane.evaluation_body(scorers=["ours"])
    made = plane.post("/v1/evaluations", request)
    assert made["scorers"] == ["ours"]
    refused = plane.http.delete(f"{SCORERS}/{record.id}")
    assert refused.status_code == 409
    assert made["id"] in refused.json()["error"]["message"]
    plane.post(f"/v1/evaluations/{made['id']}/cancel", None)
    plane.settle()
    assert plane.http.delete(f"{SCORERS}/{record.id}").status_code == 200
    error = plane.error("/v1/evaluations", request, 404)
    assert (error["param"], error["code"]) == ("scorers.0", "scorer_not_found")
    assert error["message"] == 'scorers.0: scorer "ours" does not exist'


def test_a_job_of_an_earlier_version_has_built_in_scorers(plane):
    job = plane.job(evaluation=evaluation(plane, "taste", "match"))
    with plane.database.write("default") as session:
        row = session.query(Job).one()
        row.inputs = {name: value for name, value in row.inputs.items() if name != "scorers"}
    plane.settle(80)
    spec = plane.launcher.specs[f"{job['id']}-evaluate-a1"]
    assert spec.scorers == [BUILT_IN["taste"], BUILT_IN["match"]]


def validated(plane: Plane, best_metric: str, *used: str) -> dict:
    return plane.job_body(
        training={"steps": 2, "batch_size": 4, "checkpoint_every": 1},
        evaluation=evaluation(plane, *used),
        validation={"every": 1, "num_prompts": 1, "best_metric": best_metric},
    )


def test_a_registered_scorer_chooses_the_checkpoint(any_plane):
    made = insert(any_plane, "ours", "clip")
    job = any_plane.post(JOBS, validated(any_plane, "ours", "ours"))
    any_plane.settle(80)
    done = any_plane.get(f"{JOBS}/{job['id']}")
    assert (done["status"], done["validation"]["best_metric"]) == ("succeeded", "ours")
    assert list(done["result"]["evaluate"]["scores"]) == ["ours"]
    spec = any_plane.launcher.specs[f"{job['id']}-train-a1"]
    assert (spec.validation.best_metric, spec.scorers[0].digest) == ("ours", made.digest)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("diversity", "is of kind diversity, which compares the images of a prompt: validation draws one"),
        ("drift", "is of kind drift, which compares a model with the base, and lower is better"),
    ],
)
def test_validation_does_not_measure_what_compares_images_and_says_so(plane, kind, why):
    insert(plane, "ours", kind)
    request = validated(plane, "ours", "ours")
    request["evaluation"]["images_per_prompt"] = 2
    error = plane.error(JOBS, request)
    assert error["param"] == "validation.best_metric"
    assert error["message"] == f'validation.best_metric: {why}, got "ours"'
    request = validated(plane, "taste", "taste", "ours")
    request["evaluation"]["images_per_prompt"] = 2
    job = plane.post(JOBS, request)
    events = plane.get(f"{JOBS}/{job['id']}/events")["data"]
    warnings = [event["message"] for event in events if event["level"] == "warning"]
    assert warnings == [f"validation does not measure ours: it {why}"]


def test_diversity_of_one_image_a_prompt_is_refused(plane):
    insert(plane, "ours", "diversity")
    error = plane.error(JOBS, plane.job_body(evaluation=evaluation(plane, "match", "ours")))
    assert error["param"] == "evaluation.scorers.1"
    why = "is of kind diversity: evaluation.images_per_prompt must be at least 2"
    assert error["message"] == f'evaluation.scorers.1: {why}, got "ours"'
    error = plane.error("/v1/evaluations", plane.evaluation_body(scorers=["ours"]))
    assert error["param"] == "scorers.0"


def test_only_built_in_scorers_limit_prompts_and_sizes(plane):
    insert(plane, "ours", "clip")
    (plane.root / "other.txt").write_text("a plaid sphere\nan astronaut\n")
    fields = {"prompts_uri": str(plane.root / "other.txt"), "sample": {"height": 64, "width": 64}}
    assert plane.job(evaluation=evaluation(plane, "ours", **fields))["status"] == "validating"
    error = plane.error(JOBS, plane.job_body(evaluation=evaluation(plane, "ours", "match", **fields)))
    assert error["param"] == "evaluation.scorers"


def test_a_source_outside_of_the_allowed_ones_is_a_403(tmp_path, checkpoints, sqlite_url):
    for plane in make_plane(tmp_path, sqlite_url):
        settings: Settings = plane.app_settings
        plane.http.app.state.settings = settings.model_copy(update={"allowed_sources": (str(tmp_path),)})
        error = plane.error(SCORERS, body(checkpoints, "clip"), 403)
        assert (error["param"], error["code"]) == ("uri", "source_not_allowed")
        inside = shutil.copytree(checkpoints["clip"][0], tmp_path / "inside")
        request = body(checkpoints, "clip", uri=str(inside), processor=checkpoints["clip"][0])
        assert plane.error(SCORERS, request, 403)["param"] == "processor"
