"""`dde plan`: plans every recipe without a server, prints every term, names field and value of bad input."""

from __future__ import annotations

import json

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dde_core.methods import METHODS
from dde_core.planning import mfu
from dde_core.planning.cluster import Cluster
from dde_core.planning.plan import PICK_A_PIC_PAIRS, Run, plan
from services.client import recipes
from services.client.bodies import PLACEHOLDERS, job_body
from services.client.cli import app
from services.client.plan import rounded, rounds_of

CLUSTER = {"gpus": 256, "gpu": "h100"}
ON = ("--gpus", 256, "--gpu", "h100")


def dde(*arguments: object, columns: int = 200) -> Result:
    environment = {
        "DDE_URL": "http://127.0.0.1:9",
        "DDE_API_KEY": "",
        "DDE_HOME": "/nowhere",
        "COLUMNS": str(columns),
    }
    return CliRunner().invoke(app, list(map(str, arguments)), env=environment)


PLANNED = [
    (name, CLUSTER if "tailorpo" not in name else {"gpus": 16, "gpu": "h100"}) for name in recipes.names()
]


@pytest.mark.parametrize(("name", "cluster"), PLANNED)
def test_every_recipe_is_planned_term_by_term(name, cluster):
    result = dde("plan", "--recipe", name, "--gpus", cluster["gpus"], "--gpu", "h100")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    recipe, body = (
        recipes.load(name),
        job_body(None, {}, recipes.merged(PLACEHOLDERS, recipes.load(name).job), is_dry=True),
    )
    run = Run(
        family=recipe.family,
        objective=body.objective,
        training=body.training,
        cluster=Cluster(**cluster),
        mfu=mfu.published(recipe.family),
        rounds=rounds_of(body),
    )
    planned = plan(run)
    assert bool(planned.prompt) == METHODS[recipe.method].on_policy
    held = [term for terms in planned.actors.values() for term in terms]
    for term in (
        *planned.prompt,
        *planned.round,
        *held,
        *planned.step,
        *planned.data,
        *planned.checkpoint,
        *planned.hours,
    ):
        assert term.name in result.stdout
        assert term.formula in result.stdout
        assert f"{rounded(term.value)} {term.unit}".strip() in result.stdout
    for memory in planned.memory.values():
        assert all(f"{term.value:,.2f}" in result.stdout for term in memory)
        assert f"{sum(term.value for term in memory):,.2f}" in result.stdout
    for check in mfu.checks(run.mfu):
        assert check.name in result.stdout
    method = METHODS[recipe.method]
    assert ("reference ledger" in result.stdout) == (method.has_reference and not method.on_policy)


def test_rollouts_are_planned_with_their_actors(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("rollouts: {actors: 6, reward_actors: 2}\n")
    shown = dde("plan", file, "--recipe", "sd15_tailorpo", "--gpu", "h100").stdout
    assert (
        "on 4 x H100 80 GB in 1 nodes and 8 for 6 rollout actors + 2 reward actors" in shown.splitlines()[0]
    )
    assert "memory of one reward actor" in shown
    assert "4 training workers + 6 rollout actors + 2 reward actors" in shown
    assert "here, ledger" not in shown, "no public recipe is like it"


def test_the_headline_states_the_known_error_of_the_estimate():
    first = dde("plan", "--recipe", "sdxl_dde", *ON).stdout.splitlines()[0]
    # TFLOP/s of an A100 in Diffusion-DPO's runs: pairs, times TFLOP of text, VAE and passes, over hours.
    speeds = {
        "sd15": 2000 * 2048 * (0.0133 + 2 * (1.1167 + 4 * 0.8033)) / (384 * 3600),
        "sdxl": 2000 * 2048 * (0.1112 + 2 * (4.879 + 5 * 6.761)) / (4800 * 3600),
    }
    training = speeds["sdxl"] / speeds["sd15"]
    encoding = [
        images_per_s * tflop / speeds["sdxl"] for images_per_s, tflop in ((58, 1.1167), (210, 0.2727))
    ]
    of_training = f"{training:.2f} to {1 / training:.2f} of published hours of training"
    of_encoding = f"{min(encoding):.2f} to {max(encoding):.2f} of encoding"
    assert first.endswith(f" USD (checks: {of_training}, {of_encoding})")
    assert "0.71 to 1.40 of published" in first


def test_no_number_is_cut_on_80_columns():
    shown = dde("plan", "--recipe", "sdxl_dde", *ON, columns=80).stdout
    assert "…" not in shown
    for check in mfu.checks(mfu.published("sdxl")):
        assert f"{check.ratio:.2f}" in shown


def test_a_job_file_overrides_the_recipe_and_sets_the_number_of_gpus(tmp_path):
    file = tmp_path / "job.json"
    file.write_text(
        json.dumps({"workers": [2, 16], "training": {"micro_batch_size": 4, "gradient_checkpointing": False}})
    )
    result = dde(
        "plan", file, "--recipe", "sd15_uniform", "--price", 1.25, "--interconnect", 12, "--pairs", 10_000
    )
    assert "on 16 x A100 80 GB in 2 nodes" in result.stdout
    assert "32 micro-batches" in result.stdout
    assert "checkpointing on" in result.stdout, "what would change the numbers"
    assert "at 12 GB/s" in result.stdout
    assert "GPU-hours x 1.25 USD" in result.stdout
    assert "10,000 pairs" in result.stdout


def test_without_a_recipe_the_family_is_required(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("objective: {method: uniform}\ntraining: {precision: bf16, steps: 10}\n")
    assert (
        dde("plan", file).stderr == "error: model family required: pass --recipe or --family (sd15 or sdxl)\n"
    )
    assert "SDXL at 1024 px, uniform, on 1 x A100" in dde("plan", file, "--family", "sdxl").stdout


def test_a_measured_speed_is_used_if_there_is_one_and_its_absence_is_reported(tmp_path):
    file, name = (
        tmp_path / "results.json",
        "sdxl at 1024 px, bf16, micro 2, with gradient checkpointing, train_vs_public_recipe",
    )
    rows = {
        "ledger_vs_online": {"ratio": 1.25},
        name: {"ratio": 1.4, "value": 3.0, "machine": "NVIDIA H100 80GB HBM3"},
    }
    file.write_text(json.dumps(rows))
    measured = dde("plan", "--recipe", "sdxl_dde", *ON, "--calibration", file)
    assert (
        "calibrated: measured: 3 pairs/s of sdxl on an H100 80 GB, micro 2, with checkpointing"
        in measured.stdout
    )
    assert "16.4% of peak 989" in measured.stdout
    assert "ledger_vs_online" in measured.stdout
    other = dde("plan", "--recipe", "sd15_dde", "--calibration", file).stdout
    assert (
        "the results have no measured step of sd15 in bf16 on a known GPU; calibrated by Diffusion-DPO's 384"
        in other
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", 0], "gpus must be greater than 0, got 0"),
        (["--gpus", 4096], "gpus must be at most training.batch_size = 2048, got 4096"),
        (["--gpu", "b300"], "gpu must be one of a100, h100, h200, got 'b300'"),
        (["--price", 0], "price_usd must be greater than 0, got 0.0"),
        (["--interconnect", "nan"], "interconnect_gb_s must be a finite number, got nan"),
        (["--pairs", 0], "num_pairs must be greater than 0, got 0"),
        (["--family", "sd3"], "family must be one of sd15, sdxl, got 'sd3'"),
    ],
)
def test_bad_input_is_refused_naming_field_and_value(arguments, message):
    result = dde("plan", "--recipe", "sdxl_dde", *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {message}\n")


def test_the_default_dataset_is_pick_a_pic():
    assert f"{PICK_A_PIC_PAIRS:,} pairs" in dde("plan", "--recipe", "sdxl_dde", *ON).stdout
