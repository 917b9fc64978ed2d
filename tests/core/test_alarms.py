import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dde_core.shapes
from dde_core.alarms import RISE, SATURATED, WINDOW, Alarms
from dde_core.config import ObjectiveConfig
from dde_core.metrics import step_metrics
from dde_core.models.folder import ModelFolder
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


def told(alarms, *runs):
    """Every message, with the number of its step."""
    steps = [metrics for each in runs for metrics in each]
    return [(n, message) for n, metrics in enumerate(steps, 1) for message in alarms.step(metrics)]


@pytest.fixture
def alarms():
    return Alarms(ObjectiveConfig(method="uniform", beta=BETA))


def test_winners_that_get_worse_while_losers_do_so_faster_ring_once_and_once_more_when_it_is_over(alarms):
    said = told(alarms, run(60, rise_w=0.05, rise_l=0.09, noise=0.0), run(60))
    assert len(said) == 2
    (first, fleeing), (over, end) = said
    assert first == WINDOW
    assert fleeing.startswith("loser-fleeing: winners' errors rose by 0.05")
    assert "from 0.02, losers' 0.09" in fleeing
    assert "learning_rate" in fleeing
    assert "beta (now 500)" in fleeing
    assert end == "loser-fleeing is over: nothing of it in the last 20 steps"
    assert 60 + WINDOW < over < 60 + 2 * WINDOW


@pytest.mark.parametrize(
    ("rise_w", "rise_l"), [(0.05, 0.01), (0.5 * RISE, 0.09), (-0.01, 0.02), (0.05, 0.05)]
)
def test_loser_fleeing_needs_both_a_rise_and_a_margin_that_grows(alarms, rise_w, rise_l):
    assert not [message for _, message in told(alarms, run(100, rise_w, rise_l)) if "fleeing" in message]


def test_one_noisy_step_rings_nothing(alarms):
    assert told(alarms, run(30), run(1, rise_w=0.5, rise_l=1.0), run(30, seed=1)) == []


def test_hundreds_of_steps_at_chance_and_at_the_allowed_rise_ring_nothing(alarms):
    assert told(alarms, run(600, rise_w=RISE - 0.001, rise_l=RISE - 0.001)) == []


def test_weights_near_zero_everywhere_are_saturation_and_name_beta(alarms):
    ((step, message),) = told(alarms, run(50, left=SATURATED / 2))
    assert step == WINDOW
    assert message.startswith(
        "saturation: gradient weights are 0.025 of what they would be at logit 0, below 0.05 at every t:"
    )
    assert "Lower objective.beta (now 500)" in message


def test_saturation_names_the_tenths_where_it_is_and_those_where_it_is_not(alarms):
    ((_, message),) = told(alarms, run(50, left=lambda t: np.where(t > 900, 0.2, 0.01)))
    assert (
        "in the tenths of t up to 100, 200, 300, 400, 500, 600, 700, 800, 900, not in those up to 1000"
        in message
    )


def test_weights_that_are_small_for_some_t_alone_are_no_saturation(alarms):
    assert told(alarms, run(100, left=lambda t: np.where(t > 500, 0.5, 0.0))) == []


def test_an_accuracy_that_stays_below_chance_is_learning_backwards(alarms):
    ((step, message),) = told(alarms, run(60, rise_w=0.004, rise_l=0.0))
    assert step < 60
    assert message.startswith("learning backwards: implicit accuracy is 0.")
    assert "labels" in message


@pytest.mark.parametrize("cut", [7, 20, 45, 75])
def test_a_run_that_goes_on_from_a_checkpoint_warns_as_if_it_had_not_ended(cut):
    objective = ObjectiveConfig(method="uniform", beta=BETA)
    steps = [*run(60, rise_w=0.05, rise_l=0.09, left=0.01), *run(60, seed=1)]
    whole, first, second = (Alarms(objective) for _ in range(3))
    expected = told(whole, steps)
    assert len(expected) == 4
    before = told(first, steps[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = [(cut + n, message) for n, message in told(second, steps[cut:])]
    assert before + after == expected


def test_a_run_without_a_reference_rings_nothing():
    values = torch.full((8,), 0.5, dtype=torch.float64)
    terms = StepTerms(loss=values, gradient_weight=values, gradient_weight_at_zero=values)
    metrics = step_metrics(torch.arange(1, 801, 100), PairErrors(values), None, terms, 1000)
    assert told(Alarms(ObjectiveConfig(method="sft")), [metrics] * 50) == []


def test_alarms_need_no_torch():
    code = "import sys, dde_core.alarms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_spoils_its_model_rings_and_the_demo_does_not(tmp_path, monkeypatch):
    world = Path(dde_core.shapes.__file__).parent
    model = ModelFolder(world / "model")
    encoded = EncodeHere(monkeypatch, model, tmp_path / "data")(world / "data" / "pairs.parquet").dataset
    common = {"batch_size": 64, "checkpoint_every": 1000, "steps": 30}

    def said(name, objective, learning_rate):
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
        return told(Alarms(objective), metrics)

    spoilt = said("spoilt", ObjectiveConfig(method="uniform", beta=500.0), 3e-4)
    assert [message.split(":")[0] for _, message in spoilt] == ["loser-fleeing"]
    assert said("demo", ObjectiveConfig(method="dde", beta=5000.0, calibration_bins=50), 5e-5) == []
