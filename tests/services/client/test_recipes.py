"""Every shipped recipe is a job with the paper's numbers and can be inspected without a server."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.testing import CliRunner, Result

from dde_core.config import LoraConfig
from dde_core.methods import METHODS, MethodName
from dde_core.planning.estimate import FACTS, Estimate, estimate
from services.api.requests import AlignmentJobCreate
from services.client import recipes
from services.client.bodies import job_body
from services.client.cli import app
from services.errors import BadRequest
from services.evaluation.published import BEAT_RATIOS
from tests.services.client.conftest import KEY

ROOT = Path(__file__).parents[3]
ON_POLICY = ["sd15_tailorpo", "sd15_tailorpo_g"]
PAPER = [
    *(f"sd15_{method}" for method in ("dde", "dde_single", "dde_step", "discounted", "sft", "uniform")),
    *(f"sdxl_{method}" for method in ("dde", "discounted", "uniform")),
]
"""Those of DDE's paper."""
NAMES = sorted(PAPER + ON_POLICY)
REST = {"model": "base", "dataset": "ds_1", "prompts": "s3://b/prompts.txt"}
OPTIONS = [part for name, value in REST.items() for part in (f"--{name}", value)]
CREATE = ("jobs", "create")


def dde(*arguments: object, **env: str) -> Result:
    """Run the command without a server and without a key."""
    environment = {
        "DDE_URL": "http://127.0.0.1:9",
        "DDE_API_KEY": "",
        "DDE_HOME": "/nowhere",
        "COLUMNS": "160",
        **env,
    }
    return CliRunner().invoke(app, list(map(str, arguments)), env=environment)


def body_of(name: str) -> AlignmentJobCreate:
    return job_body(None, REST, recipes.load(name).job, is_dry=True)


def needed_for(name: str) -> Estimate:
    body = body_of(name)
    assert isinstance(body.workers, int)
    return estimate(recipes.load(name).family, body.objective, body.training, body.workers)


def printed_body(result: Result) -> dict:
    """The JSON at the head of a dry run."""
    assert result.exit_code == 0, result.output
    return json.JSONDecoder().raw_decode(result.stdout)[0]


def test_these_are_shipped():
    assert recipes.names() == NAMES
    assert {recipe.method for recipe in recipes.all_recipes()} == set(get_args(MethodName))


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_is_a_job_with_the_numbers_of_the_paper(name):
    recipe, body = recipes.load(name), body_of(name)
    objective, training = body.objective, body.training
    assert name == f"{recipe.family}_{objective.method}"
    assert (objective.beta, objective.ema_rate, objective.gamma) == (5000, 0.1, 0.9)
    assert objective.t_min == 1
    assert objective.t_max == objective.max_weight == objective.calibration_bins == 0
    assert (training.learning_rate, training.batch_size) == (2.05e-5, 2048)
    assert training.steps == {"sd15": 2000, "sdxl": 1500}[recipe.family]
    assert training.lora is None
    assert training.gradient_checkpointing
    assert 0 < training.micro_batch_size < training.batch_size / body.workers
    assert (training.precision, body.workers) == ("bf16", 8)
    assert (body.evaluation.num_prompts, body.evaluation.images_per_prompt) == (326, 8)
    assert objective.ignored() == {}


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_marks_its_own_choices_and_leaves_out_what_the_user_chooses(name):
    text, recipe = (ROOT / "services" / "client" / "recipes" / f"{name}.yaml").read_text(), recipes.load(name)
    fields = [line.strip() for line in text.split("training:")[1].splitlines() if ":" in line]
    for name in ("warmup_steps", "optimizer", "precision", "caption_dropout", "sample"):
        assert any(field.startswith(f"{name}:") and "# ours" in field for field in fields), name
    for name in ("steps", "batch_size", "learning_rate", "gradient_checkpointing", "lora", "workers"):
        assert any(field.startswith(f"{name}:") and "# paper" in field for field in fields), name
    assert not {"model", "dataset", "name"} & set(recipe.job)
    assert "prompts_uri" not in recipe.job["evaluation"]


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_recipe_of_tailorpo_has_the_numbers_of_spo_and_marks_its_own(name):
    recipe, body = recipes.load(name), body_of(name)
    objective, training, rollouts = body.objective, body.training, body.rollouts
    assert name == f"{recipe.family}_{objective.method}"
    assert (objective.transitions, objective.eta, objective.guidance_scale) == (20, 1.0, 5.0)
    assert (objective.beta, objective.continue_from, objective.label) == (10, "random", "hard")
    assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (6e-5, 1e-4, 1.0)
    assert training.lora == LoraConfig(rank=4)
    assert rollouts
    assert rollouts.num_prompts == 4000
    assert (training.held_out_pairs, training.caption_dropout, training.reference) == (0, 0, "auto")
    assert training.checkpoint_every % rollouts.updates_per_round == 0
    ranked = len(objective.ranked_starts(1000))
    assert ranked == 16
    in_a_round = training.batch_size * rollouts.updates_per_round
    assert in_a_round <= rollouts.prompts_per_round * ranked / 2, "one block is enough if half are kept"
    assert objective.ignored() == {}
    text = (ROOT / "services" / "client" / "recipes" / f"{name}.yaml").read_text()
    fields = [line for line in text.split("objective:")[1].split("sample:")[0].splitlines() if ": " in line]
    unmarked = [line for line in fields if "# SPO" not in line and "# ours" not in line]
    assert [line.split(":")[0].strip() for line in unmarked] == [
        "method",
        "seed",
        "num_prompts",
        "images_per_prompt",
        "seed",
        "scorers",
    ]
    assert not {"prompts_uri", "scorers"} & set(recipe.job["rollouts"]), "the user's own"
    assert not {"model", "dataset", "name"} & set(recipe.job)


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_dry_run_of_rollouts_shows_what_is_the_users_to_choose(name, tmp_path):
    body = printed_body(dde(*CREATE, "--recipe", name, "--dry-run"))
    assert "dataset" not in body
    assert body["rollouts"]["prompts_uri"].endswith("PROMPTS")
    assert body["rollouts"]["scorers"] == {"SCORER": 1.0}
    file = tmp_path / "job.yaml"
    file.write_text("rollouts: {scorers: {taste: 0.5}, prompts_uri: 's3://b/p.txt', num_prompts: 9}")
    body = printed_body(dde(*CREATE, file, "--recipe", name, "--dry-run"))
    assert body["rollouts"]["scorers"] == {"taste": 0.5}
    assert (body["rollouts"]["num_prompts"], body["rollouts"]["prompts_per_round"]) == (9, 32)
    refused = dde(*CREATE, "--recipe", name, *OPTIONS)
    assert refused.exit_code == 1
    assert "rollouts.scorers: Field required" in refused.stderr


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_recipes_of_a_family_differ_in_the_objective_alone(family):
    jobs = [
        dict(recipe.job, objective=None) for recipe in map(recipes.load, PAPER) if recipe.family == family
    ]
    assert all(job == jobs[0] for job in jobs)


def test_noise_is_that_of_each_methods_own_source():
    noise = {recipe.method: recipe.job["objective"].get("noise") for recipe in map(recipes.load, PAPER)}
    alike, each = "shared", "independent"
    expected = {
        "dde": each,
        "dde_single": each,
        "dde_step": each,
        "uniform": alike,
        "discounted": alike,
        "sft": None,
    }
    assert noise == expected


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(BadRequest, match=r"recipe must be one of sd15_dde, .*, got '\.\./recipes/sd15_dde'"):
        recipes.load("../recipes/sd15_dde")
    result = dde(*CREATE, "--recipe", "sd3_dde")
    assert result.exit_code == 1
    assert result.stderr == f"error: recipe must be one of {', '.join(NAMES)}, got 'sd3_dde'\n"


def test_recipes_are_listed():
    result = dde("recipes")
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert lines[0] == ["name", "family", "method", "about"]
    assert [line[0] for line in lines[1:]] == NAMES
    assert all(about for *_, about in lines)


def test_an_option_overrides_the_file_and_the_file_overrides_the_recipe(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(
        yaml.safe_dump({"objective": {"beta": 2000}, "training": {"steps": 7, "seed": 3}, "workers": 2})
    )
    body = printed_body(dde(*CREATE, file, "--recipe", "sd15_dde", *OPTIONS, "--steps", 9, "--dry-run"))
    assert (body["objective"]["beta"], body["objective"]["method"]) == (2000, "dde")
    assert (body["training"]["steps"], body["training"]["seed"], body["training"]["batch_size"]) == (
        9,
        3,
        2048,
    )
    assert (body["workers"], body["model"]) == (2, "base")
    AlignmentJobCreate.model_validate_json(json.dumps(body))


def test_a_recipe_is_posted_as_the_dry_run_shows_it(server):
    environment = {"DDE_URL": server.url, "DDE_API_KEY": KEY}
    shown = printed_body(dde(*CREATE, "--recipe", "sdxl_uniform", *OPTIONS, "--dry-run", **environment))
    assert server.requests == []
    result = dde(*CREATE, "--recipe", "sdxl_uniform", *OPTIONS, **environment)
    assert (result.exit_code, result.stdout) == (0, "new_1\n"), result.output
    ((_, _, posted),) = server.sent("POST", "/v1/alignment/jobs")
    assert posted == shown


@pytest.mark.parametrize("name", PAPER)
def test_a_dry_run_prints_every_term(name):
    result = dde(*CREATE, "--recipe", name, *OPTIONS, "--dry-run")
    assert printed_body(result)["objective"]["method"] == recipes.load(name).method
    needed = needed_for(name)
    for term in (*needed.memory, *needed.time):
        assert term.name in result.stdout
        assert term.formula in result.stdout
    assert f"{needed.memory_gb:,.2f}" in result.stdout
    assert ("frozen parameters" in result.stdout) == METHODS[recipes.load(name).method].has_reference


def test_a_dry_run_on_another_gpu_takes_less_time():
    hours = {}
    for gpu in ("a100", "h200"):
        result = dde(*CREATE, "--recipe", "sd15_dde", *OPTIONS, "--dry-run", "--gpu", gpu)
        assert gpu.upper() in result.stdout
        hours[gpu] = float(result.stdout.split("GPU-hours")[1].split(" h")[0])
    assert hours["h200"] < hours["a100"] / 3


def test_without_a_recipe_the_estimate_needs_a_family():
    without, given = (dde(*CREATE, *OPTIONS, "--dry-run", *more) for more in ([], ["--family", "sd15"]))
    assert printed_body(without) == printed_body(given)
    assert "no estimate: model family required: pass --recipe or --family (sd15 or sdxl)" in without.stdout
    assert "Stable Diffusion 1.5 at 512 px" in given.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "b300"], "gpu must be one of a100, h100, h200, got 'b300'"),
        (["--family", "sd3"], "family must be one of sd15, sdxl, got 'sd3'"),
        (
            ["--workers", "4096"],
            "workers: must be a number from 1 to 1024, or two of them as [least, most], got 4096",
        ),
        (["--batch-size", "4"], "workers must be at most training.batch_size = 4, got 8"),
        (["--beta", "0"], "objective.beta: Input should be greater than 0, got 0.0"),
    ],
)
def test_a_dry_run_refuses_bad_input_naming_field_and_value(arguments, message):
    result = dde(*CREATE, "--recipe", "sd15_dde", *OPTIONS, "--dry-run", *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {message}\n")


def test_options_of_a_dry_run_are_refused_without_it():
    result = dde(*CREATE, "--recipe", "sd15_dde", *OPTIONS, "--gpu", "h100")
    assert (result.exit_code, result.stderr) == (1, "error: --gpu h100 is only allowed with --dry-run\n")


def test_a_dry_run_needs_no_model_no_dataset_and_no_prompts_and_a_job_does():
    result = dde(*CREATE, "--recipe", "sd15_dde", "--dry-run")
    assert result.exit_code == 0
    body = printed_body(result)
    assert (body["model"], body["dataset"]) == ("MODEL", "DATASET")
    refused = dde(*CREATE, "--recipe", "sd15_dde")
    assert refused.exit_code == 1
    assert refused.stderr == "error: model: Field required; evaluation.prompts_uri: Field required\n"


def test_a_job_on_rollouts_needs_no_dataset(server, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n")
    command = (*CREATE, "--model", "base", "--method", "tailorpo", "--beta", "10", "--prompts", "held.txt")
    command += ("--rollout-prompts", str(prompts), "--num-rollout-prompts", "1")
    command += ("--reward", "pick", "--reward", "taste=0.5")
    result = dde(*command, "--dry-run")
    body = printed_body(result)
    assert "dataset" not in body
    assert body["objective"]["method"] == "tailorpo"
    expected = {"prompts_uri": prompts.as_uri(), "num_prompts": 1, "scorers": {"pick": 1.0, "taste": 0.5}}
    assert {name: body["rollouts"][name] for name in expected} == expected
    result = dde(*command, DDE_URL=server.url, DDE_API_KEY=KEY)
    assert result.exit_code == 0, result.output
    ((_, _, posted),) = server.sent("POST", "/v1/alignment/jobs")
    assert posted["rollouts"] == body["rollouts"]
    assert posted.get("dataset") is None
    dataset = dde(*command, "--rollout-prompts", "captions:ds_1", "--dry-run")
    assert printed_body(dataset)["rollouts"]["prompts_uri"] == "captions:ds_1"


@pytest.mark.parametrize("reward", ["=1", "taste=much"])
def test_a_reward_without_a_name_or_with_a_weight_that_is_no_number_is_refused(reward):
    result = dde(*CREATE, "--reward", reward, "--dry-run")
    expected = f"error: --reward must be NAME or NAME=WEIGHT, as in taste=0.5, got {reward!r}\n"
    assert (result.exit_code, result.stderr) == (1, expected)


@pytest.mark.parametrize(("name", "ratio"), [("sd15_uniform", 0.9277), ("sdxl_uniform", 0.6555)])
def test_hours_of_uniform_are_of_the_published_order(name, ratio, capsys):
    """Published runs encoded images every step. sd15: 5 passes, theirs 4. sdxl: 1500 steps, theirs 2000."""
    hours, published = needed_for(name).gpu_hours, FACTS[recipes.load(name).family].published.gpu_hours
    with capsys.disabled():
        print(f"\n{name}: {hours:.0f} A100-hours, {hours / published:.2f} of the {published:.0f} published")
    assert hours / published == pytest.approx(ratio, rel=1e-3)


def test_the_dry_run_in_the_planning_guide_works():
    guide = (ROOT / "docs" / "planning.md").read_text()
    (line,) = [line for line in guide.splitlines() if line.endswith("--dry-run")]
    result = dde(*shlex.split(line)[1:])
    assert printed_body(result)["training"]["steps"] == 1500
    assert "H200" in result.stdout


def test_a_recipe_fits_the_memory_of_the_papers_gpus():
    assert all(needed_for(name).memory_gb < 0.9 * 96 for name in PAPER)


def test_the_paper_s_beat_ratios_are_shares_of_the_prompts_that_a_recipe_asks_for():
    asked = {body_of(name).evaluation.num_prompts for name in PAPER}
    ratios = [ratio for row in BEAT_RATIOS.values() for ratio in row]
    counts = {n for n in range(2, 1000) if all(round(round(ratio * n) / n, 4) == ratio for ratio in ratios)}
    assert asked == {min(counts)}
