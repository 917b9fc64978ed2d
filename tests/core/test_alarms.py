import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dde_core.shapes
from dde_core.alarms import MAX_WINNER_RISE, SATURATED, WINDOW, Alarms
from dde_core.config import ObjectiveConfig
from dde_core.models.folder import ModelFolder
from dde_core.step_metrics import step_metrics
from dde_core.train_step import PairErrors, StepTerms
from tests.support.encode_here import EncodeHere
from tests.support.encoded_pairs import train_here

REFERENCE = 0.02
BETA = 500.0


def run(steps, rise_w=0.0, rise_l=0.0, noise=0.01, left=1.0, seed=0, pairs=64):
    """Metrics of steps in which errors have risen by so much, and so much of the gradient weights is left."""
    rng = np.random.default_rng(seed)

    def column(values):
        return torch.as_tensor(np.broadcast_to(values, pairs).astype(np.float64).copy())

    for _ in range(steps):
        t = rng.integers(1, 1001, pairs)
        w, l = (REFERENCE + rise + noise * rng.standard_normal(pairs) for rise in (rise_w, rise_l))  # noqa: E741
        ref = PairErrors(column(REFERENCE), column(REFERENCE))
        theta = PairErrors(column(w), column(l))
        terms = StepTerms(
            loss=column(0.5),
            gradient_weight=column(0.25 * (left(t) if callable(left) else left)),
            gradient_weight_at_zero=column(0.25),
            margin=(ref.w - theta.w) - (ref.l - theta.l),
        )
        yield step_metrics(torch.as_tensor(t), theta, ref, terms, 1000)


def reported(alarms, *runs):
    """Every alarm, with the number of its step."""
    steps = [metrics for each in runs for metrics in each]
    return [(n, alarm) for n, metrics in enumerate(steps, 1) for alarm in alarms.step(metrics)]


@pytest.fixture
def alarms():
    return Alarms(ObjectiveConfig(method="uniform", beta=BETA))


def test_likelihood_displacement_is_reported_when_it_appears_and_when_it_has_ended(alarms):
    both = reported(alarms, run(60, rise_w=0.05, rise_l=0.09, noise=0.0), run(60))
    assert len(both) == 2
    (first, appeared), (last, ended) = both
    assert first == WINDOW
    assert (appeared.name, appeared.level) == ("likelihood displacement", "warning")
    assert appeared.message.startswith("likelihood displacement: winners' errors rose by 0.05")
    assert "from 0.02, losers' by 0.09" in appeared.message
    assert "learning_rate" in appeared.message
    assert "beta (now 500)" in appeared.message
    assert (ended.name, ended.level) == ("likelihood displacement", "info")
    assert ended.message == "likelihood displacement has ended: not seen in the last 20 steps"
    assert 60 + WINDOW < last < 60 + 2 * WINDOW


@pytest.mark.parametrize(
    ("rise_w", "rise_l"), [(0.05, 0.01), (0.5 * MAX_WINNER_RISE, 0.09), (-0.01, 0.02), (0.05, 0.05)]
)
def test_likelihood_displacement_needs_both_a_rise_and_a_margin_that_grows(alarms, rise_w, rise_l):
    names = [alarm.name for _, alarm in reported(alarms, run(100, rise_w, rise_l))]
    assert "likelihood displacement" not in names


def test_one_noisy_step_raises_no_alarm(alarms):
    assert reported(alarms, run(30), run(1, rise_w=0.5, rise_l=1.0), run(30, seed=1)) == []


def test_hundreds_of_steps_at_chance_and_at_the_allowed_rise_raise_no_alarm(alarms):
    assert reported(alarms, run(600, rise_w=MAX_WINNER_RISE - 0.001, rise_l=MAX_WINNER_RISE - 0.001)) == []


def test_weights_near_zero_everywhere_are_saturation_and_name_beta(alarms):
    ((step, alarm),) = reported(alarms, run(50, left=SATURATED / 2))
    assert step == WINDOW
    assert (alarm.name, alarm.level) == ("saturation", "warning")
    assert alarm.message.startswith(
        "saturation: gradient weights are 0.025 of their value at logit 0, below 0.05 at every t:"
    )
    assert "Lower objective.beta (now 500)" in alarm.message


def test_saturation_names_the_tenths_where_it_is_and_those_where_it_is_not(alarms):
    ((_, alarm),) = reported(alarms, run(50, left=lambda t: np.where(t > 900, 0.2, 0.01)))
    tenths = "in the tenths of t up to 100, 200, 300, 400, 500, 600, 700, 800, 900, not in those up to 1000"
    assert tenths in alarm.message


def test_weights_that_are_small_for_some_t_alone_are_no_saturation(alarms):
    assert reported(alarms, run(100, left=lambda t: np.where(t > 500, 0.5, 0.0))) == []


def test_an_accuracy_that_stays_below_chance_is_learning_backwards(alarms):
    ((step, alarm),) = reported(alarms, run(60, rise_w=0.004, rise_l=0.0))
    assert step < 60
    assert (alarm.name, alarm.level) == ("learning backwards", "warning")
    assert alarm.message.startswith("learning backwards: implicit accuracy is 0.")
    assert "label" in alarm.message


@pytest.mark.parametrize("cut", [7, 20, 45, 75])
def test_a_resumed_run_reports_the_alarms_of_an_uninterrupted_one(cut):
    objective = ObjectiveConfig(method="uniform", beta=BETA)
    steps = [*run(60, rise_w=0.05, rise_l=0.09, left=0.01), *run(60, seed=1)]
    whole, first, second = (Alarms(objective) for _ in range(3))
    expected = reported(whole, steps)
    assert len(expected) == 4
    before = reported(first, steps[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = [(cut + n, alarm) for n, alarm in reported(second, steps[cut:])]
    assert before + after == expected


def test_a_run_without_a_reference_raises_no_alarm():
    values = torch.full((8,), 0.5, dtype=torch.float64)
    terms = StepTerms(loss=values, gradient_weight=values, gradient_weight_at_zero=values)
    metrics = step_metrics(torch.arange(1, 801, 100), PairErrors(values), None, terms, 1000)
    assert reported(Alarms(ObjectiveConfig(method="sft")), [metrics] * 50) == []


def test_alarms_need_no_torch():
    code = "import sys, dde_core.alarms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_spoils_its_model_raises_an_alarm_and_the_demo_does_not(tmp_path, monkeypatch):
    world = Path(dde_core.shapes.__file__).parent
    model = ModelFolder(world / "model")
    encoded = EncodeHere(monkeypatch, model, tmp_path / "data")(world / "data" / "pairs.parquet").dataset
    common = {"batch_size": 64, "checkpoint_every": 1000, "steps": 30}

    def alarms_of(name, objective, learning_rate):
        folder = tmp_path / name
        metrics = train_here(
            folder,
            model,
            Path(encoded.removeprefix("file://")),
            objective,
            learning_rate=learning_rate,
            **common,
        )
        assert len(metrics) == 30
        return reported(Alarms(objective), metrics)

    spoilt = alarms_of("spoilt", ObjectiveConfig(method="uniform", beta=500.0), 3e-4)
    assert [alarm.name for _, alarm in spoilt] == ["likelihood displacement"]
    assert alarms_of("demo", ObjectiveConfig(method="dde", beta=5000.0, calibration_bins=50), 5e-5) == []
