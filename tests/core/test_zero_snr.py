"""Training with zero terminal SNR: nothing is infinite at T, where nothing of an image is left."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dde_core.calibration import Calibration
from dde_core.config import ObjectiveConfig
from dde_core.credit import curves
from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from dde_core.objectives import weights
from dde_core.schedule import Schedule
from dde_core.step_metrics import logit_deviation
from dde_core.train_step import PairErrors, pair_errors, step_losses
from tests.support.methods import OF_DATASETS
from tests.support.pair_batches import random_pairs

T = 1000


@pytest.fixture
def zero(sd_config) -> Schedule:
    return Schedule.from_config(
        sd_config | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    )


def v_model(scale: float, x, t) -> SimpleNamespace:
    """A model of v that is wrong everywhere."""
    return SimpleNamespace(sample=scale * torch.sin(x + t.view(-1, 1, 1, 1)))


@pytest.mark.parametrize("method", OF_DATASETS)
def test_every_method_has_a_finite_loss_at_every_t(zero: Schedule, method: str):
    config = ObjectiveConfig(method=method, max_weight=100.0)
    pairs = random_pairs([1, 500, T - 1, T])
    scale = torch.tensor(1.0, requires_grad=True)
    theta = pair_errors(lambda x, t: v_model(scale, x, t), zero, pairs)
    ref = pair_errors(lambda x, t: v_model(0.9, x, t), zero, pairs)
    if METHODS[method].has_loser:
        assert theta.w[-1] == theta.l[-1] == 0, "noise is read from x_T, whatever the model predicts"
    calibration = Calibration(zero, config)
    correction = calibration.correction(pairs.t)
    terms = step_losses(theta, ref, pairs.t, config, zero, correction)
    assert terms.loss.isfinite().all()
    terms.loss.sum().backward()
    assert scale.grad.isfinite()
    assert not METHODS[method].has_loser or terms.loss[-1].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("method", ["dde", "dde_single"])
def test_an_infinite_weight_is_refused_with_both_ways_out(zero: Schedule, method: str):
    for t_max in (0, T):
        with pytest.raises(
            ConfigError, match="max_weight must be greater than 0, or t_max at most 999"
        ) as error:
            weights(ObjectiveConfig(method=method, t_max=t_max), zero)
        assert (error.value.field, error.value.value) == ("max_weight", 0.0)
    assert weights(ObjectiveConfig(method=method, max_weight=50.0), zero)[T] == 50
    below = weights(ObjectiveConfig(method=method, t_max=T - 1), zero)
    assert below.isfinite().all()
    assert below[T - 1] == 1 / zero.snr[T - 1]


@pytest.mark.parametrize("point", ["expected", "sampled", "mode"])
@pytest.mark.parametrize("bins", [0, 10])
def test_T_is_not_calibrated_and_all_else_is(zero: Schedule, point, bins: int):
    config = ObjectiveConfig(method="dde_step", calibration_point=point, calibration_bins=bins)
    calibration = Calibration(zero, config)
    t = torch.tensor([500, T])
    errors = [PairErrors(*(torch.tensor([value, 0.0]) for value in (e, e, 0.0, 0.0))) for e in (0.1, 0.2)]
    calibration.update(t, *errors)
    assert calibration.correction(torch.arange(1, T + 1)).isfinite().all()
    alone = Calibration(zero, config)
    alone.update(t[:1], *(error.rows(slice(0, 1)) for error in errors))
    assert torch.equal(calibration.theta_w, alone.theta_w)
    assert calibration.theta_w.any()


def test_rounding_noise_and_credit_are_finite(zero: Schedule):
    deviation = logit_deviation(
        torch.tensor([500, T]), torch.tensor([1e-9, 0.0]), zero.snr[[500, T]], 5000, T
    )
    assert all(math.isfinite(value) for value in deviation.values())
    found = curves(ObjectiveConfig(method="dde", t_max=T - 1), zero, 1e-4)
    assert found.credit.isfinite().all()
    assert found.credit[-1] == 0
