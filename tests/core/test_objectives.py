from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dde_core.config import ObjectiveConfig
from dde_core.methods import METHODS, MethodName
from dde_core.objectives import OBJECTIVES, gradient_weight, preference_logit, preference_loss, weights

BETA = 5000.0


def test_the_table_holds_exactly_the_methods_of_the_config():
    assert list(OBJECTIVES) == list(METHODS) == list(get_args(MethodName))


def test_each_method_has_the_needs_of_its_source():
    corrected = {name for name, method in METHODS.items() if method.corrected}
    alone = {name for name, method in METHODS.items() if not (method.has_reference or method.has_loser)}
    shared = {name for name, method in METHODS.items() if method.noise == "shared"}
    assert corrected == {"dde", "dde_step"}
    assert alone == {"sft"}
    assert shared == {"uniform", "discounted"}


def test_only_preferences_have_a_reference_and_only_they_have_a_loser():
    assert all(method.has_reference == method.has_loser for method in METHODS.values())


def test_weights_are_one_over_snr_and_one_half(schedule):
    dde, uniform = (weights(ObjectiveConfig(method=method), schedule) for method in ("dde", "uniform"))
    torch.testing.assert_close(
        dde[1:] * schedule.snr[1:], torch.ones(1000, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert dde[0] == 0
    assert dde[1000].item() == pytest.approx(213.588, abs=1e-3)
    assert (uniform == 0.5).all()
    assert uniform.shape == dde.shape == (1001,)
    assert uniform.dtype == torch.float64


def test_a_cap_holds_the_weights_above_it_and_no_others(schedule):
    free = weights(ObjectiveConfig(), schedule)
    capped = weights(ObjectiveConfig(max_weight=10.0), schedule)
    assert (capped[free > 10] == 10).all()
    assert (free > 10).sum() > 0
    assert torch.equal(capped[free <= 10], free[free <= 10])


def test_at_t_1_and_at_t_T_nothing_is_infinite_even_for_absurd_margins(schedule):
    w = weights(ObjectiveConfig(), schedule)[torch.tensor([1, 1000, 1, 1000])]
    margin = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    logit = preference_logit(BETA, w, margin, torch.zeros_like(w))
    loss = preference_loss(logit)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert margin.grad.isfinite().all()
    assert gradient_weight(w, logit).isfinite().all()
    assert loss[3].item() == pytest.approx(BETA * 213.588, rel=1e-4)


finite = st.floats(-1, 1)


@given(st.floats(1, 1e4), st.floats(0, 214), finite, finite)
def test_the_loss_is_minus_log_sigmoid_and_its_slope_is_minus_beta_g(beta, w, margin, c):
    w, c = torch.tensor([w], dtype=torch.float64), torch.tensor([c], dtype=torch.float64)
    margin = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    logit = preference_logit(beta, w, margin, c)
    loss = preference_loss(logit)
    loss.sum().backward()
    assert logit.item() == beta * (w * margin + c).item()
    torch.testing.assert_close(loss, torch.log1p(torch.exp(-logit.abs())) + (-logit).clamp(min=0))
    torch.testing.assert_close(margin.grad, -beta * gradient_weight(w, logit.detach()), rtol=1e-9, atol=1e-30)


@given(st.floats(-50, 50), st.floats(0.5, 1))
def test_the_soft_loss_is_the_cross_entropy_with_p_and_its_slope_is_sigmoid_minus_p(logit, p):
    p = torch.tensor([p], dtype=torch.float64)
    logit = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(logit, p)
    loss.sum().backward()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logit, p, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    weight = torch.ones_like(p)
    torch.testing.assert_close(logit.grad, -gradient_weight(weight, logit.detach(), p), rtol=1e-9, atol=1e-12)


def test_the_soft_loss_is_least_where_the_policy_is_as_sure_as_the_label():
    p = torch.tensor([0.6, 0.75, 0.99], dtype=torch.float64)
    logit = torch.log(p / (1 - p))
    assert gradient_weight(torch.ones_like(p), logit, p).abs().max() < 1e-15
    for step in (-0.1, 0.1):
        assert (preference_loss(logit + step, p) > preference_loss(logit, p)).all()
