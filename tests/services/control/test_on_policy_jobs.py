"""Jobs of on-policy methods: rollouts in place of a dataset, what is refused at once, their stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError
from dde_core.schedule import Schedule
from dde_core.scorers.kinds import KINDS
from dde_core.transitions import ranked_transitions
from services.artifacts.prompts import digest_of, read_prompts
from services.control.stages import run
from services.control.tables import Job, Scorer
from services.storage import files
from tests.services.control import fakes
from tests.services.control.conftest import Plane, make_plane, write_base, write_pairs
from tests.services.control.test_held_out import CAPTIONS
from tests.services.control.test_scorers import insert
from tests.services.control.test_studies import cell_jobs, evaluate, settle
from tests.support.zero_folder import change

JOBS = "/v1/alignment/jobs"
EVALUATIONS = "/v1/evaluations"
STUDIES = "/v1/studies"
DRAWN = ["a small red circle", "a large blue square", "a green circle", "a blue cross"]


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """A plane for requests that are refused: they leave nothing behind."""
    folder = tmp_path_factory.mktemp("steady")
    yield from make_plane(folder, f"sqlite:///{folder}/dde.db")


@pytest.fixture(autouse=True)
def base_of_shapes(request):
    """The base draws images of the size that the built-in scorers read, on whichever plane the test has."""
    for name in ("plane", "any_plane", "steady"):
        if name in request.fixturenames:
            draw(request.getfixturevalue(name).root / "base", 32)


def draw(base: Path, size_px: int) -> None:
    """Let a base draw images of another size, which its VAE divides by 2."""
    change(base, "unet/config.json", sample_size=size_px // 2)


def merged(body: dict, changes: dict) -> dict:
    """The body with changes of its sections; None removes a section or a field."""
    result = dict(body)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def body(plane: Plane, **changes: Any) -> dict:
    """A job on rollouts that differs from other jobs' in its prompts, too."""
    prompts = plane.root / "drawn.txt"
    prompts.write_text("\n".join(DRAWN))
    on_policy = {
        "model": "shapes",
        "objective": {"method": "tailorpo", "beta": 10},
        "rollouts": {"prompts_uri": str(prompts), "num_prompts": 3, "scorers": {"taste": 1.0}},
        "training": {"steps": 2, "batch_size": 4},
        "evaluation": {"prompts_uri": str(plane.root / "prompts.txt"), "num_prompts": 2},
    }
    return merged(on_policy, changes)


def refused(plane: Plane, param: str, words: str, status: int = 400, path: str = JOBS, **changes) -> dict:
    """The error of such a job; nothing of it is stored."""
    before = plane.get(JOBS)["data"]
    error = plane.error(path, body(plane, **changes), status)
    assert error["param"] == param, error
    assert words in error["message"], error["message"]
    assert plane.get(JOBS)["data"] == before
    return error


# ---- a job from its request to its model


def test_a_job_on_rollouts_trains_at_once_and_is_evaluated(any_plane):
    plane = any_plane
    insert(plane, "likes", "clip")
    weights = {"taste": 1.0, "likes": 0.5}
    job = plane.post(JOBS, body(plane, rollouts={"scorers": weights, "prompts_per_call": 2}))
    prompts = files.as_uri(plane.root / "drawn.txt")
    assert job["dataset"] is None
    assert job["rollouts"]["prompts_uri"] == prompts
    assert job["rollouts"]["scorers"] == weights
    assert (job["rollouts"]["prompts_per_call"], job["rollouts"]["max_blocks"]) == (2, 8)
    plane.settle(60)
    done = plane.get(f"{JOBS}/{job['id']}")
    assert done["status"] == "succeeded"
    assert done["result"]["encode"] is done["result"]["ledger"] is None
    assert list(done["stage_seconds"]) == ["train", "evaluate"]
    assert plane.launcher.submitted == [f"{job['id']}-train-a1", f"{job['id']}-evaluate-a1"]
    spec = plane.launcher.specs[f"{job['id']}-train-a1"]
    assert spec.dataset is spec.ledger is None
    assert spec.rollouts.model_dump(mode="json") == job["rollouts"]
    assert [record.name for record in spec.rewards] == list(spec.rollouts.scorers) == ["likes", "taste"]
    assert spec.prompts_digest == digest_of(read_prompts(prompts, 3))
    assert list(spec.scorer_files()) == ["file:///nowhere"]
    events = plane.events(job["id"])
    assert events[0] == f"created: tailorpo on shapes with prompts {prompts}"
    assert "queued -> running: stage train" in events
    assert plane.get(f"{JOBS}?status=succeeded")["data"] == [done]
    assert plane.get("/v1/models/" + done["name"])["job"] == job["id"]


def test_a_scorer_of_the_reward_may_be_named_by_its_id_and_is_kept_while_the_job_needs_it(plane):
    record = insert(plane, "likes", "clip")
    plane.launcher.plays["train"] = fakes.runs
    job = plane.post(JOBS, body(plane, rollouts={"scorers": {record.id: 2.0, "taste": None}}))
    assert job["rollouts"]["scorers"] == {"likes": 2.0}
    plane.settle()
    refusal = plane.http.delete("/v1/scorers/likes")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (409, "in_use")
    plane.post(f"{JOBS}/{job['id']}/cancel", None)
    plane.settle()
    assert plane.http.delete("/v1/scorers/likes").status_code == 200


def test_a_failed_training_on_rollouts_resumes_as_another_attempt(plane):
    plane.launcher.plays["train"] = fakes.fails
    job = plane.post(JOBS, body(plane))
    plane.settle()
    assert plane.get(f"{JOBS}/{job['id']}")["stage"] == "train"
    plane.launcher.plays["train"] = fakes.train
    assert plane.post(f"{JOBS}/{job['id']}/resume", None)["status"] == "queued"
    plane.settle(60)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "succeeded"
    assert f"{job['id']}-train-a2" in plane.launcher.submitted


def test_a_job_whose_prompts_are_gone_before_it_starts_fails_by_name(plane):
    job = plane.post(JOBS, body(plane))
    (plane.root / "drawn.txt").unlink()
    plane.settle()
    reason = plane.get(f"{JOBS}/{job['id']}")["reason"]
    assert (reason["code"], reason["param"]) == ("prompts_not_found", "rollouts.prompts_uri")


@pytest.mark.parametrize(
    ("fields", "least", "most"),
    [({}, 2, 2), ({"actors": 3, "reward_actors": 2}, 6, 6), ({"workers": 3, "actors": 2}, 5, 5)],
)
def test_a_cluster_of_its_own_has_room_for_workers_and_for_the_actors_of_rollouts(
    steady, fields, least, most
):
    rollouts = {name: value for name, value in fields.items() if name != "workers"}
    made = body(steady, rollouts=rollouts, workers=fields.get("workers", 1))
    job = Job(id="ajob_1", kind="alignment", stage="train", attempt=1, project="default", request=made)
    settings = steady.settings.model_copy(update={"use_gpu": True})
    needs = run(job, settings.storage_uri, settings).needs
    assert (needs.least, needs.most, needs.gpus) == (least, most, 1)
    job.stage = "evaluate"
    assert run(job, settings.storage_uri, settings).needs.most == settings.evaluate_actors


def test_numbers_of_rounds_are_metrics_of_their_steps(plane):
    rounds = {"round": 1.0, "rollout_reward": 0.5, "rollout_kept_share": 0.75, "rollout_reward_t0952": 0.25}

    def train(spec):
        writer = fakes.Journal(spec.prefix, flush_every_s=0.0)
        writer.metrics(0, rounds)
        writer.metrics(1, {"loss": 0.7})
        writer.event("guard: fidelity fell by 0.2: training ends", "warning")
        writer.flush()
        return fakes.train(spec)

    plane.launcher.plays["train"] = train
    job = plane.post(JOBS, body(plane))
    plane.settle(60)
    rows = plane.get(f"{JOBS}/{job['id']}/metrics?stage=train&after=-1")["data"]
    assert (rows[0]["step"], rows[0]["metrics"]) == (0, rounds)
    assert "guard: fidelity fell by 0.2: training ends" in plane.events(job["id"])


# ---- refused: which fields belong together


def test_a_method_says_whether_it_needs_a_dataset_or_rollouts(steady):
    error = refused(steady, "rollouts", "required by method 'tailorpo', which draws its own", rollouts=None)
    assert error["code"] == "missing_required_parameter"
    refused(steady, "dataset", "must be null for method 'tailorpo'", dataset=steady.dataset["id"])
    words = "must be null for method 'dde', only tailorpo and tailorpo_g draw their own pairs, got {"
    refused(steady, "rollouts", words, objective={"method": "dde"}, dataset=steady.dataset["id"])
    words = "dataset: required by method 'sft'"
    error = refused(steady, "dataset", words, objective={"method": "sft"}, rollouts=None)
    assert error["code"] == "missing_required_parameter"


REFUSED = {
    "held-out pairs": ("training.held_out_pairs", "must be 0", {"training": {"held_out_pairs": 2}}),
    "dropped captions": ("training.caption_dropout", "must be 0", {"training": {"caption_dropout": 0.1}}),
    "a ledger": ("training.reference", 'must be "auto"', {"training": {"reference": "ledger"}}),
    "more workers where there is room": ("workers", "must be one number", {"workers": [1, 2]}),
    "a scorer beside the gradient": (
        "rollouts.reward_actors",
        "must be 0, as the gradient passes through scorer and U-Net in one process, for method 'tailorpo_g'",
        {"objective": {"method": "tailorpo_g"}, "rollouts": {"reward_actors": 1}},
    ),
    "a metric of held-out pairs": (
        "validation.best_metric",
        "there are no held-out pairs",
        {"validation": {"every": 50, "num_prompts": 1, "best_metric": "held_out_accuracy"}},
    ),
    "held-out captions": (
        "evaluation.prompts_uri",
        "without a dataset no captions are held out",
        {"evaluation": {"prompts_uri": "held-out:"}},
    ),
    "held-out captions of validation": (
        "validation.prompts_uri",
        "without a dataset no captions are held out",
        {"validation": {"every": 50, "num_prompts": 1, "prompts_uri": "held-out:ds_1?pairs=3"}},
    ),
    "the other methods' beta": ("objective.beta", "must be at most 1000", {"objective": {"beta": 5000}}),
    "velocities": ("objective.error", "is not defined", {"objective": {"error": "velocity"}}),
    "too many transitions": (
        "objective.transitions",
        "must be at most half of the schedule's 1000 timesteps, got 501",
        {"objective": {"transitions": 501}},
    ),
    "no transition": (
        "objective.t_min",
        "and t_max = 601 hold none of the transitions, which start at [952, 902, ",
        {"objective": {"t_min": 553, "t_max": 601}},
    ),
    "too few pairs": (
        "rollouts.prompts_per_round",
        "2 blocks of trajectories with 19 ranked transitions make at most 38 pairs, and a round needs 39",
        {"rollouts": {"prompts_per_round": 1, "max_blocks": 2}, "training": {"batch_size": 39}},
    ),
    "too few prompts": (
        "rollouts.prompts_uri",
        "has 4 prompts, rollouts.num_prompts requires 5",
        {"rollouts": {"num_prompts": 5}},
    ),
    "no scorer": ("rollouts.scorers", "at least 1 item", {"rollouts": {"scorers": {"taste": None}}}),
    "a weight of 0": ("rollouts.scorers.taste", "greater than 0", {"rollouts": {"scorers": {"taste": 0}}}),
    "a scorer twice": (
        "rollouts.scorers",
        "must not repeat, got 'taste' and its id 'scorer_taste'",
        {"rollouts": {"scorers": {"scorer_taste": 1.0}}},
    ),
    "a guard that is not evaluated": (
        "rollouts.guard",
        "must be among evaluation.scorers ['match', 'taste', 'fidelity'], got \"clip\"",
        {"rollouts": {"guard": {"clip": 0.1}}},
    ),
    "a guard without validation": (
        "rollouts.guard",
        "needs validation with num_prompts of 1 or more",
        {"rollouts": {"guard": {"fidelity": 0.1}}},
    ),
    "a negative guard": (
        "rollouts.guard.fidelity", "greater than", {"rollouts": {"guard": {"fidelity": -1}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("param", "words", "changes"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_at_once(steady, param, words, changes):
    refused(steady, param, words, **changes)


# ---- refused: prompts and scorers


def test_prompts_that_are_not_there_or_not_text_are_refused_by_name(steady):
    missing = str(steady.root / "nowhere.txt")
    refused(steady, "rollouts.prompts_uri", "does not exist", 404, rollouts={"prompts_uri": missing})
    image = steady.root / "image.txt"
    image.write_bytes(b"\xff\xd8\xff")
    changes = {"prompts_uri": str(image)}
    assert refused(steady, "rollouts.prompts_uri", "not UTF-8", rollouts=changes)["code"] == "not_utf8"


def test_a_prompt_that_models_are_compared_on_is_refused_unless_it_is_allowed(plane):
    both = plane.root / "both.txt"
    both.write_text("a large blue square\na red cross\na green square\n")
    evaluated = {"evaluation": {"prompts_uri": str(both)}}
    error = refused(plane, "rollouts.prompts_uri", "1 of its prompts are among evaluation", **evaluated)
    assert error["code"] == "trained_on_prompts"
    assert "'a large blue square'" in error["message"]
    validation = {"every": 1, "num_prompts": 1}
    validated = {"training": {"checkpoint_every": 1}, "validation": {**validation, "prompts_uri": str(both)}}
    refused(plane, "rollouts.prompts_uri", "1 of its prompts are among validation's prompts", **validated)
    after = {"evaluation": {"prompts_uri": str(plane.root / "after.txt")}, "validation": validation}
    (plane.root / "after.txt").write_text("a red cross\na red square\na green circle\n")
    words = "1 of its prompts are among validation's prompts, such as 'a green circle'"
    refused(plane, "rollouts.prompts_uri", words, **(validated | after))
    job = plane.post(JOBS, body(plane, rollouts={"allow_evaluation_prompts": True}, **evaluated))
    warnings = [
        each for each in plane.get(f"{JOBS}/{job['id']}/events")["data"] if each["level"] == "warning"
    ]
    assert [each["message"].split(",")[0] for each in warnings] == [
        "rollouts.prompts_uri: 1 of its prompts are among evaluation.prompts_uri"
    ]


def test_only_scorers_that_the_project_has_and_that_score_each_image_can_be_the_reward(plane):
    error = refused(plane, "rollouts.scorers", "does not exist", 404, rollouts={"scorers": {"pick": 1.0}})
    assert error["code"] == "scorer_not_found"
    for kind, whose in (("diversity", "all images of a prompt"), ("drift", "all images of a model")):
        insert(plane, f"my-{kind}", kind)
        words = f"must score each image, got 'my-{kind}', whose number belongs to {whose}"
        error = refused(plane, "rollouts.scorers", words, rollouts={"scorers": {f"my-{kind}": 1.0}})
        assert error["code"] == "scorer_not_of_images"


def test_a_built_in_scorer_is_the_reward_only_of_prompts_and_sizes_that_it_can_score(plane):
    (plane.root / "cats.txt").write_text("a red cross\na photo of a cat\na green square\n")
    changes = {"rollouts": {"prompts_uri": str(plane.root / "cats.txt"), "allow_evaluation_prompts": True}}
    refused(plane, "rollouts.scorers", "taste cannot score: ", **changes)
    insert(plane, "likes", "clip")
    plane.post(JOBS, body(plane, **merged(changes, {"rollouts": {"scorers": {"likes": 1.0, "taste": None}}})))
    draw(plane.root / "base", 64)
    refused(plane, "rollouts.scorers", "taste cannot score: height must be 32 (or 0) for the scorers")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].level == "image"])
def test_the_gradient_of_every_score_of_one_image_can_guide_winners(plane, kind):
    name = kind
    if not KINDS[kind].is_built_in:
        name = insert(plane, f"my-{kind}", kind).name
        with plane.database.write("default") as session:
            session.query(Scorer).update({"resize": "antialiased"})
    changes = {"objective": {"method": "tailorpo_g"}, "rollouts": {"scorers": {name: 1.0}}}
    if name != "taste":
        changes["rollouts"]["scorers"]["taste"] = None
    assert plane.post(JOBS, body(plane, **changes))["objective"]["method"] == "tailorpo_g"


def test_an_aliased_scorer_guides_no_winners_but_ranks_them(plane):
    insert(plane, "hps", "hps")
    with plane.database.write("default") as session:
        session.query(Scorer).update({"resize": "aliased"})
    changes = {"rollouts": {"scorers": {"hps": 1.0}}}
    words = "must have gradients for method 'tailorpo_g': hps has resize \"aliased\""
    refused(plane, "rollouts.scorers", words, objective={"method": "tailorpo_g"}, **changes)
    plane.post(JOBS, body(plane, **changes))


def test_a_guard_on_a_scorer_that_validation_leaves_out_is_refused(plane):
    insert(plane, "far", "drift")
    changes = {
        "rollouts": {"guard": {"far": 0.1}},
        "evaluation": {"scorers": ["taste", "far"]},
        "training": {"checkpoint_every": 1},
        "validation": {"every": 1, "num_prompts": 1},
    }
    refused(plane, "rollouts.guard", "is of kind drift, which compares a model with the base", **changes)
    changes["evaluation"]["scorers"] = ["taste", "fidelity"]
    changes["rollouts"]["guard"] = {"fidelity": 0.1}
    assert plane.post(JOBS, body(plane, **changes))["rollouts"]["guard"] == {"fidelity": 0.1}


def test_settings_that_need_a_dataset_are_reported_as_ignored(plane):
    changes = {
        "objective": {"noise": "shared", "gamma": 0.5},
        "data": {"flip": "all"},
        "training": {"draws": 3, "reference": "online"},
    }
    job = plane.post(JOBS, body(plane, **changes))
    events = plane.events(job["id"])
    for setting in (
        "objective.noise = shared", "objective.gamma = 0.5", "data.flip = all", "training.draws = 3",
        "training.reference = online",
    ):  # fmt: skip
        assert f"method 'tailorpo' ignores {setting}" in events
    assert "method 'tailorpo' ignores" not in " ".join(plane.events(plane.post(JOBS, body(plane))["id"]))


# ---- which transitions are ranked


@pytest.mark.parametrize("timesteps", [1000, 999, 40])
@pytest.mark.parametrize("transitions", [2, 3, 19, 20])
@pytest.mark.parametrize("bounds", [(1, 0), (300, 700), (1, 902), (20, 0)])
def test_ranked_starts_are_those_of_the_transitions_tables(timesteps, transitions, bounds):
    schedule = Schedule.from_config(
        {
            "num_train_timesteps": timesteps,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "epsilon",
        }
    )
    config = ObjectiveConfig(
        method="tailorpo", beta=10, transitions=transitions, t_min=bounds[0], t_max=bounds[1]
    )

    def starts(found) -> list[int] | str:
        try:
            return found()
        except ConfigError as error:
            return str(error)

    expected = starts(lambda: ranked_transitions(config, schedule).t.tolist())
    assert starts(lambda: config.ranked_starts(timesteps)) == expected


def test_a_base_with_zero_terminal_snr_is_refused_only_where_a_transition_starts_at_its_end(plane):
    folder = Path(plane.root / "zero")
    write_base(folder)
    draw(folder, 32)
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    change(folder, "scheduler/scheduler_config.json", **zero)
    plane.post("/v1/models", {"name": "zero", "uri": str(folder)})
    words = "must be less than half of the 1000 timesteps"
    refused(plane, "objective.transitions", words, model="zero", objective={"transitions": 500})
    for transitions in (20, 499):
        plane.post(JOBS, body(plane, model="zero", objective={"transitions": transitions}))


# ---- the captions of a dataset


@pytest.fixture
def dataset(plane: Plane) -> str:
    """Eight decided pairs of seven captions: two differ by a space alone."""
    captions = ["a red cross", "a blue circle", "a red cross ", *CAPTIONS[3:]]
    uri = write_pairs(plane.root / "pairs", caption=captions)
    return str(plane.post("/v1/datasets", {"name": "pairs", "uri": uri})["id"])


def test_rollouts_take_the_captions_of_a_dataset_each_once_and_in_its_order(plane, dataset):
    changes = {"prompts_uri": f"captions:{dataset}", "num_prompts": 7, "allow_evaluation_prompts": True}
    job = plane.post(JOBS, body(plane, rollouts=changes))
    uri = job["rollouts"]["prompts_uri"]
    assert uri == f"{plane.app_settings.storage_uri}/prompts/{dataset}-captions.jsonl"
    found = [json.loads(line)["prompt"] for line in files.read_bytes(uri).decode().splitlines()]
    assert found == ["a red cross", "a blue circle", *CAPTIONS[3:8]]
    assert job["dataset"] is None
    assert plane.http.delete(f"/v1/datasets/{dataset}").status_code == 200, "the job has its own copy"
    plane.settle(60)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "succeeded"
    spec = plane.launcher.specs[f"{job['id']}-train-a1"]
    assert spec.rollouts.prompts_uri == uri
    assert uri.startswith(spec.sources.allowed[-1])


def test_captions_of_a_dataset_that_is_not_there_has_changed_or_has_too_few_are_refused(plane, dataset):
    rollouts = {"prompts_uri": "captions:ds_" + "0" * 24}
    error = refused(plane, "rollouts.prompts_uri", "does not exist", 404, rollouts=rollouts)
    assert error["code"] == "dataset_not_found"
    refused(plane, "rollouts.prompts_uri", "does not exist", 404, rollouts={"prompts_uri": "captions:"})
    rollouts = {"prompts_uri": f"captions:{dataset}", "num_prompts": 8}
    words = "has 7 prompts, rollouts.num_prompts requires 8"
    refused(plane, "rollouts.prompts_uri", words, rollouts=rollouts)
    other = plane.post("/v1/datasets", {"name": "other", "uri": write_pairs(plane.root / "other")})
    write_pairs(plane.root / "other", caption=CAPTIONS)
    changed = {"prompts_uri": f"captions:{other['id']}", "num_prompts": 1}
    error = refused(plane, "rollouts.prompts_uri", "", rollouts=changed)
    assert error["code"] == "dataset_changed"


def test_a_model_is_not_compared_on_held_out_captions_that_it_drew_pairs_for(plane, dataset):
    drawn = plane.root / "red.txt"
    drawn.write_text("a red cross\na red cross\n")
    rollouts = {"prompts_uri": str(drawn), "num_prompts": 2, "allow_evaluation_prompts": True}
    job = plane.post(JOBS, body(plane, name="mine", rollouts=rollouts))
    plane.settle(60)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "succeeded"
    held_out = {"prompts_uri": f"held-out:{dataset}?pairs=8", "num_prompts": 2, "scorers": []}
    request = {"models": ["shapes", "mine"], **held_out}
    error = plane.error(EVALUATIONS, request)
    assert (error["code"], error["param"]) == ("trained_on_prompts", "prompts_uri")
    words = f"model mine was trained by job {job['id']} on prompts of its rollouts: 1 of them are among the"
    assert words in error["message"]
    drawn.write_text("a red cross\na large red square\n")
    assert "has changed since" in plane.error(EVALUATIONS, request)["message"]
    other = plane.post(JOBS, body(plane, name="other"))
    plane.settle(60)
    assert plane.get(f"{JOBS}/{other['id']}")["status"] == "succeeded"
    plane.post(EVALUATIONS, {"models": ["shapes", "other"], **held_out})


# ---- studies


def study(plane: Plane, **changes: Any) -> dict:
    base = body(plane)
    evaluation = {"prompts_uri": str(plane.root / "prompts.txt"), "num_prompts": 2, "scorers": ["taste"]}
    grid = {"rollouts.updates_per_round": [1, 2], "objective.lookahead": [1, 4], "training.seed": [0, 1]}
    return {"name": "looks", "base": base, "grid": grid, "evaluation": evaluation, "parallel": 8} | changes


def test_a_study_varies_rollouts_and_how_candidates_are_ranked(plane):
    plane.launcher.plays["evaluate"] = evaluate
    made = plane.post(STUDIES, study(plane))
    seen = settle(plane, made, 600)
    assert seen["status"] == "succeeded", seen["reason"]
    jobs = cell_jobs(plane, made)
    assert len(jobs) == 8
    assert len({cell["setting"] for cell in seen["cells"]}) == 4
    job = jobs["updates_per_round2-lookahead4-seed1"]
    assert (job["rollouts"]["updates_per_round"], job["objective"]["lookahead"]) == (2, 4)
    spec = plane.launcher.specs[f"{job['id']}-train-a1"]
    assert spec.prompts_digest == digest_of(read_prompts(job["rollouts"]["prompts_uri"], 3))


def test_a_study_on_the_captions_of_a_dataset_has_one_file_for_all_cells(plane, dataset):
    given = study(plane, grid={"training.seed": [0, 1]})
    rollouts = {"prompts_uri": f"captions:{dataset}", "num_prompts": 7}
    given["base"]["rollouts"] |= rollouts | {"allow_evaluation_prompts": True}
    made = plane.post(STUDIES, given)
    events = [each["message"] for each in plane.get(f"{STUDIES}/{made['id']}/events")["data"]]
    assert any("1 of its prompts are among the study's evaluation.prompts_uri" in each for each in events)
    plane.settle(80)
    uris = {job["rollouts"]["prompts_uri"] for job in cell_jobs(plane, made).values()}
    assert uris == {f"{plane.app_settings.storage_uri}/prompts/{dataset}-captions.jsonl"}


def test_a_study_names_the_cell_whose_rollouts_cannot_work(plane):
    error = plane.error(STUDIES, study(plane, grid={"training.held_out_pairs": [0, 3]}))
    assert error["param"] == "cells.held_out_pairs3.training.held_out_pairs"
    seen = plane.root / "seen.txt"
    seen.write_text("a large blue square\na red cross\n")
    given = study(plane)
    given["evaluation"]["prompts_uri"] = str(seen)
    error = plane.error(STUDIES, given)
    assert error["code"] == "trained_on_prompts"
    assert "among the study's evaluation.prompts_uri" in error["message"]
    given["evaluation"]["prompts_uri"] = "held-out:"
    error = plane.error(STUDIES, given)
    assert error["param"] == "evaluation.prompts_uri"
    assert "or a file of prompts: cell updates_per_round1-lookahead1-seed0 has no dataset" in error["message"]
