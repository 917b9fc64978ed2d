"""`dde credit`: curves as JSON, an image and a table, with and without a job."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from dde_core.config import ObjectiveConfig
from dde_core.credit import STABLE_DIFFUSION, curves
from dde_core.methods import METHODS
from dde_core.schedule import Schedule
from services.api.records import CreditBucket, CreditRecord
from services.client.api import ApiError
from services.client.cli import app
from tests.services.client.conftest import KEY

PATH = "/v1/alignment/jobs/ajob_1/credit"
OFF_POLICY = [name for name, method in METHODS.items() if not method.on_policy]
"""Those that have a weight at each t."""
SHORT = {**STABLE_DIFFUSION, "num_train_timesteps": 100}


def record(method: str = "dde", margin: float | None = 2e-4, **objective) -> CreditRecord:
    """A finished job on a schedule of 100 timesteps, with the coefficients of a margin of 2e-4 at every t."""
    config = ObjectiveConfig(method=method, beta=700.0, noise="independent", t_max=100, **objective)
    kappa = Schedule.from_config(SHORT).kappa[1:].clone()
    kappa[0] = 0
    none = torch.zeros(100).tolist()
    return CreditRecord(
        objective=config,
        scheduler=SHORT,
        steps=40,
        batch_size=32,
        calibration={"theta_w": (2e-4 * kappa).tolist(), "ref_w": none, "theta_l": none, "ref_l": none},
        buckets=[
            CreditBucket(
                t_first=10 * j + 1, t_last=10 * j + 10, pairs=128, margin=margin, logged=0.5, predicted=0.4
            )
            for j in range(10)
        ],
    )


@pytest.fixture
def dde(server, tmp_path, monkeypatch):
    """Run the command against the server, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, **env: str) -> Result:
        environment = {
            "DDE_URL": server.url,
            "DDE_API_KEY": KEY,
            "DDE_HOME": str(tmp_path / "home"),
            "COLUMNS": "200",
            **env,
        }
        return CliRunner().invoke(app, ["credit", *map(str, arguments)], env=environment)

    return run


def strict(text: str) -> dict:
    """JSON without the numbers that JSON does not have."""
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def answer_with(server, job: CreditRecord) -> None:
    server.single[PATH] = deque([job.model_dump(mode="json")])


def test_json_holds_every_method_at_every_timestep_without_requests_or_files(server, dde, tmp_path) -> None:
    result = dde("--json")
    assert result.exit_code == 0, result.stderr
    output, schedule = strict(result.stdout), Schedule.from_config(STABLE_DIFFUSION)
    assert list(output) == ["t", *OFF_POLICY]
    assert output["t"] == list(range(1, 1001))
    for method in OFF_POLICY:
        curve = curves(ObjectiveConfig(method=method), schedule, 1e-4)
        assert output[method] == {
            name: getattr(curve, name).tolist() for name in ("gradient_weight", "correction", "density")
        }
    assert server.requests == []
    assert list(tmp_path.iterdir()) == []


def test_options_are_the_objective(dde) -> None:
    options = [
        "--beta",
        500,
        "--margin",
        -1e-3,
        "--t-min",
        20,
        "--t-max",
        900,
        "--gamma",
        0.8,
        "--calibration-point",
        "mode",
    ]
    output = strict(
        dde("--method", "discounted", "--method", "dde", "--calibration-bins", 10, *options, "--json").stdout
    )
    assert list(output) == ["t", "discounted", "dde"]
    shared = {
        "beta": 500.0,
        "t_min": 20,
        "t_max": 900,
        "gamma": 0.8,
        "calibration_point": "mode",
        "calibration_bins": 10,
    }
    for method in ("discounted", "dde"):
        config = ObjectiveConfig(method=method, **shared)
        expected = curves(config, Schedule.from_config(STABLE_DIFFUSION), -1e-3)
        assert output[method]["gradient_weight"] == expected.gradient_weight.tolist()
        assert output[method]["density"] == expected.density.tolist()


def test_an_image_and_a_table_show_where_the_credit_is(dde, tmp_path) -> None:
    result = dde("--method", "dde", "--method", "uniform", "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["dde", "504", "261", "463", "609"] in lines
    assert ["uniform", "flat", "100", "500", "900"] in lines
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.size) == ("PNG", (1500, 440))
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_the_default_image_is_credit_png_in_the_current_folder(dde, tmp_path) -> None:
    assert dde("--method", "sft", "--margin", 1e6, "--batch-size", 64).exit_code == 0
    assert (tmp_path / "credit.png").read_bytes().startswith(b"\x89PNG")


def test_a_margin_that_leaves_no_credit_is_reported_and_drawn(dde) -> None:
    result = dde("--method", "dde", "--margin", 1e6)
    assert result.exit_code == 0, result.stderr
    assert ["dde", "none"] in [line.split() for line in result.stdout.splitlines()]


def test_a_job_brings_its_objective_its_schedule_and_its_metrics(server, dde) -> None:
    answer_with(server, record())
    output = strict(dde("--job", "ajob_1", "--method", "dde", "--margin", 2e-4, "--json").stdout)
    assert list(output) == ["t", "dde", "job"]
    assert output["t"] == list(range(1, 101))
    expected = curves(record().objective, Schedule.from_config(SHORT), 2e-4)
    assert output["dde"]["gradient_weight"] == expected.gradient_weight.tolist()
    assert output["job"]["buckets"] == [bucket.model_dump() for bucket in record().buckets]
    assert output["job"]["correction"] == pytest.approx(expected.correction.tolist(), rel=1e-5)
    assert output["job"]["correction"][0] > 0


def test_options_override_the_jobs_objective_but_not_its_own_correction(server, dde) -> None:
    answer_with(server, record())
    plain, other = (strict(dde("--job", "ajob_1", *more, "--json").stdout) for more in ((), ("--beta", 5)))
    assert plain["dde"]["gradient_weight"] != other["dde"]["gradient_weight"]
    assert plain["job"] == other["job"]


@pytest.mark.parametrize("method", ["uniform", "sft"])
def test_a_job_without_a_correction_has_c_0(server, dde, method) -> None:
    answer_with(server, record(method, margin=1e-4 if METHODS[method].has_reference else None))
    assert set(strict(dde("--job", "ajob_1", "--json").stdout)["job"]["correction"]) == {0.0}


def test_a_jobs_table_shows_logged_beside_predicted_and_its_image_has_two_rows(server, dde, tmp_path) -> None:
    answer_with(server, record())
    result = dde("--job", "ajob_1", "--out", tmp_path / "job.png")
    assert result.exit_code == 0, result.stderr
    assert "dde, 40 steps of 32 pairs" in result.stdout
    assert ["1..10", "128", "+2.000e-04", "0.5", "0.4", "1.2500"] in [
        line.split() for line in result.stdout.splitlines()
    ]
    with Image.open(tmp_path / "job.png") as image:
        assert image.size == (1500, 880)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", 0], "beta must be greater than 0, got 0.0"),
        (["--beta", "nan"], "beta must be a finite number, got nan"),
        (["--margin", "nan"], "margin must lie between -1e6 and 1e6, got nan"),
        (["--margin", "inf"], "margin must lie between -1e6 and 1e6, got inf"),
        (
            ["--method", "dpo"],
            f"method must be one of {', '.join(map(repr, METHODS))}, got 'dpo'",
        ),
        (["--t-min", 500, "--t-max", 300], "t_max must be 0 or at least t_min = 500, got 300"),
        (["--t-min", 0], "t_min must be at least 1, got 0"),
        (["--t-max", 1001], "t_max must be at most T = 1000, got 1001"),
        (["--calibration-bins", 1001], "calibration_bins must be at most T = 1000, got 1001"),
        (
            ["--calibration-point", "mean"],
            "calibration_point must be one of 'expected', 'sampled', 'mode', got 'mean'",
        ),
        (["--gamma", 1.5], "gamma must be at most 1, got 1.5"),
        (["--batch-size", 0], "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_with_field_and_value(dde, tmp_path, arguments, message) -> None:
    for more in ([], ["--json"]):
        result = dde(*arguments, *more)
        assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_job_without_a_record_is_reported_in_one_line(server, dde) -> None:
    server.fail(404, "job ajob_1 has no credit record: it is written when training is done", param="id")
    result = dde("--job", "ajob_1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr == "error: id: job ajob_1 has no credit record: it is written when training is done\n"
    )


def test_a_missing_folder_is_named(dde, tmp_path) -> None:
    result = dde("--out", tmp_path / "nowhere" / "credit.png")
    assert result.exit_code == 1
    assert str(tmp_path / "nowhere") in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("missing", "arguments", "code"),
    [("torch", ["--json"], 1), ("matplotlib", [], 1), ("matplotlib", ["--json"], 0)],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(missing, arguments, code, tmp_path) -> None:
    script = "; ".join(
        [
            f"import sys; sys.modules[{missing!r}] = None",
            "from services.client.cli import app",
            f"app(['credit', *{arguments!r}])",
        ]
    )
    where = {"cwd": Path(__file__).parents[3], "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", script], check=False, **where)
    assert done.returncode == code, done.stderr
    message = f"error: dde credit needs {missing}: pip install 'dde-align[credit]'\n"
    assert done.stderr == ("" if code == 0 else message)


def test_the_client_reads_the_record(server, client) -> None:
    answer_with(server, record())
    assert client.credit("ajob_1") == record()
    server.fail(404, "job 'x' does not exist", param="id", code="job_not_found")
    with pytest.raises(ApiError, match="does not exist"):
        client.credit("x")
