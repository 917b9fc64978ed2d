"""Promotions: by request, by a job's gate, and back again; Serve's records say the same as the database."""

from __future__ import annotations

import shutil

import pytest

from services.api.records import DriftResult, EvaluateResult, Interval, ScorerReport
from services.artifacts import models
from services.control import gates
from services.stages import layout
from services.storage import files
from tests.services.control import fakes
from tests.services.control.conftest import write_base
from tests.services.control.test_access import bearer, new_key

JOBS = "/v1/alignment/jobs"
GATE = {"scorer": "taste", "beat_ratio_low": 0.5, "not_worse": ["match"]}


def scored(**numbers: tuple[Interval, Interval]) -> EvaluateResult:
    """Each scorer's difference and beat ratio."""
    scores = {
        name: {"m": ScorerReport(base=0.5, candidate=0.5, difference=difference, beat_ratio=ratio)}
        for name, (difference, ratio) in numbers.items()
    }
    return EvaluateResult(
        report="r",
        grid="g",
        base="shapes",
        num_prompts=2,
        images_per_prompt=1,
        images_drawn=4,
        scores=scores,
        seconds=1.0,
    )


def interval(low: float, high: float) -> Interval:
    return Interval(value=(low + high) / 2, low=low, high=high)


def evaluates_to(plane, taste: tuple[float, float], match: tuple[float, float] = (-0.1, 0.1)) -> None:
    """Let the next jobs' evaluations give this beat ratio of taste and this difference in match."""
    half = interval(0.4, 0.6)
    result = scored(taste=(interval(0, 1), interval(*taste)), match=(interval(*match), half))
    plane.launcher.plays["evaluate"] = lambda spec: fakes.done(spec, result)


def aligned(plane, **body) -> dict:
    """A job that has run, with a model named m."""
    job = plane.job(name="m", **body)
    plane.settle(80)
    return plane.get(f"{JOBS}/{job['id']}")


def version(plane, name: str) -> str:
    """What a name refers to, for the API and for Serve alike."""
    found = plane.get(f"/v1/models/{name}")["version"]
    assert models.find(plane.app_settings.storage_uri, name).id == found
    return found


@pytest.mark.parametrize(
    ("taste", "match", "reasons"),
    [
        ((0.51, 0.6), (-0.1, 0.1), []),
        ((0.5, 0.7), (-0.1, 0.1), ["taste"]),
        ((0.51, 0.6), (-0.2, -0.1), ["match"]),
        ((0.51, 0.6), (0.1, 0.2), []),
        ((0.2, 0.7), (-0.2, -0.1), ["taste", "match"]),
    ],
)
def test_a_gate_compares_the_ends_of_intervals_and_names_what_fails(taste, match, reasons):
    half = interval(0.4, 0.6)
    result = scored(taste=(interval(0, 1), interval(*taste)), match=(interval(*match), half))
    outcome = gates.judge(gates.PromoteIf(scorer="taste", not_worse=["match"]), result, "m")
    assert outcome.passed == (not reasons)
    assert [reason.partition(":")[0] for reason in outcome.reasons] == reasons


def test_a_job_whose_model_passes_its_gate_promotes_it_and_says_so(any_plane):
    plane = any_plane
    evaluates_to(plane, taste=(0.55, 0.7))
    job = aligned(plane, promote_if=GATE)
    assert (job["status"], job["result"]["gate"]) == (
        "succeeded",
        {"passed": True, "alias": "production", "reasons": []},
    )
    assert version(plane, "m@production") == version(plane, "m") == job["aligned_model"]
    assert plane.get("/v1/models/m")["aliases"] == ["production"]
    assert f"gate: passed; m@production is {job['aligned_model']}" in plane.events(job["id"])


def test_a_model_that_fails_its_gate_is_kept_and_the_promoted_one_stays(any_plane):
    plane = any_plane
    evaluates_to(plane, taste=(0.55, 0.7))
    good = aligned(plane, promote_if=GATE)
    evaluates_to(plane, taste=(0.45, 0.6))
    bad = aligned(plane, promote_if=GATE)
    assert bad["status"] == "succeeded"
    assert not bad["result"]["gate"]["passed"]
    assert bad["result"]["gate"]["reasons"] == [
        "taste: beat ratio 0.525 [0.450, 0.600] is not surely above 0.5"
    ]
    assert version(plane, "m") == bad["aligned_model"], "the newest keeps the plain name"
    assert version(plane, "m@production") == good["aligned_model"]
    assert any("gate: failed: taste" in message for message in plane.events(bad["id"]))


def test_promoting_an_earlier_version_rolls_back_for_the_next_request(each_plane):
    plane = each_plane
    first, second = aligned(plane)["aligned_model"], aligned(plane)["aligned_model"]
    plane.get("/v1/models/m@production", 404)
    for each in (second, first, second):
        answer = plane.post(f"/v1/models/{each}/promote", {})
        assert (answer["version"], answer["aliases"]) == (each, ["production"])
        assert version(plane, "m@production") == each
    plane.post("/v1/models/m/promote", {"alias": "canary"})
    assert plane.get("/v1/models/m")["aliases"] == ["canary", "production"]
    listed = {model["version"]: model["aliases"] for model in plane.get("/v1/models")["data"]}
    assert (listed[first], listed[second]) == ([], ["canary", "production"])


def test_a_job_and_an_evaluation_take_an_alias_for_a_model(plane):
    first, _ = aligned(plane)["aligned_model"], aligned(plane)
    shutil.copytree(
        plane.root / "base", files.local_path(plane.get(f"/v1/models/{first}")["uri"]), dirs_exist_ok=True
    )  # the fake run wrote no weights
    plane.post(f"/v1/models/{first}/promote", {})
    body = {"prompts_uri": str(plane.root / "prompts.txt"), "num_prompts": 2}
    evaluation = plane.post("/v1/evaluations", {"models": ["shapes", "m@production"], **body})
    assert evaluation["models"][1]["model"] == first
    assert plane.job(model="m@production", name="n")["model"] == first


def test_a_promoted_model_is_not_deleted_before_another_takes_its_place(any_plane):
    plane = any_plane
    first, second = aligned(plane)["aligned_model"], aligned(plane)["aligned_model"]
    plane.post(f"/v1/models/{first}/promote", {})
    error = plane.http.delete(f"/v1/models/{first}").json()["error"]
    assert (error["code"], "m@production" in error["message"]) == ("in_use", True)
    plane.post(f"/v1/models/{second}/promote", {})
    assert plane.http.delete(f"/v1/models/{first}").status_code == 200
    assert version(plane, "m@production") == second


def test_two_projects_promote_models_of_one_name_apart(any_plane):
    plane = any_plane
    ours = aligned(plane)["aligned_model"]
    team = bearer(new_key(plane, "team-a")["key"])
    theirs = plane.post("/v1/models", {"name": "m", "uri": write_base(plane.root / "theirs")}, headers=team)[
        "version"
    ]
    plane.post(f"/v1/models/{ours}/promote", {})
    plane.post(f"/v1/models/{theirs}/promote", {}, headers=team)
    plane.post(f"/v1/models/{ours}/promote", {}, 404, headers=team)
    root = layout.project_root(plane.app_settings.storage_uri, "team-a")
    assert models.find(root, "m@production").id == theirs
    assert version(plane, "m@production") == ours
    assert plane.get("/v1/models/m", headers=team)["aliases"] == ["production"]


@pytest.mark.parametrize(
    ("gate", "param"),
    [
        ({"scorer": "fidelity"}, "promote_if.scorer"),
        ({"scorer": "taste", "not_worse": ["fidelity"]}, "promote_if.not_worse"),
        ({"scorer": "taste", "not_worse": ["match", "match"]}, "promote_if.not_worse"),
        ({"scorer": "taste", "beat_ratio_low": 1.0}, "promote_if.beat_ratio_low"),
        ({"scorer": "taste", "alias": "m@x"}, "promote_if.alias"),
        ({}, "promote_if.scorer"),
    ],
)
def test_a_gate_that_can_never_be_judged_is_refused(plane, gate, param):
    evaluation = {
        "prompts_uri": str(plane.root / "prompts.txt"), "num_prompts": 3, "scorers": ["taste", "match"]
    }  # fmt: skip
    error = plane.error(JOBS, plane.job_body(evaluation=evaluation, promote_if=gate))
    assert error["param"] == param


def test_a_gate_reads_drift_against_its_limit(plane):
    half = interval(0.4, 0.6)
    passes = scored(taste=(half, interval(0.6, 0.7)))
    for value, passed in ((1.0, True), (3.0, False)):
        drift = {"cmmd": {"m": DriftResult(value=value, limit=2.0, is_beyond=value > 2.0)}}
        result = passes.model_copy(update={"drift": drift})
        outcome = gates.judge(gates.PromoteIf(scorer="taste", not_worse=["cmmd"]), result, "m")
        assert outcome.passed == passed
        assert outcome.reasons == ([] if passed else ["cmmd: drift 3 is beyond 2.0"])


@pytest.mark.parametrize("alias", ["", "Production", "a b", "a/b", "a@b", "../x", "a" * 64])
def test_an_alias_is_a_short_plain_word(plane, alias):
    assert plane.error("/v1/models/shapes/promote", {"alias": alias})["param"] == "alias"
    plane.get(f"/v1/models/shapes@{alias}", 404)
