import pytest
import torch

from dde_core.step_metrics import step_metrics
from dde_core.train_step import PairErrors, StepTerms


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def metrics():
    """Four pairs at t = 1, 100, 101 and 1000."""
    theta = PairErrors(column(0.1, 0.2, 0.3, 0.4), column(0.5, 0.5, 0.5, 0.5))
    ref = PairErrors(column(0.2, 0.2, 0.2, 0.2), column(0.4, 0.6, 0.5, 0.5))
    terms = StepTerms(
        loss=column(1, 2, 3, 6).requires_grad_(),
        logit=column(0, 0, 0, 0),
        margin=column(0.2, -0.1, 0.0, 0.5),
        gradient_weight=column(10, 20, 30, 40),
        gradient_weight_at_zero=column(10, 20, 30, 60),
    )
    return step_metrics(torch.tensor([1, 100, 101, 1000]), theta, ref, terms, 1000)


def test_a_step_is_summed_up_by_means_over_the_global_batch(metrics):
    whole = {name: value for name, value in metrics.items() if "_t" not in name}
    assert whole == pytest.approx(
        {
            "loss": 3.0,
            "implicit_accuracy": 2.5 / 4,  # two wins, a tie, a loss
            "margin": 0.15,
            "winner_error": 0.25,
            "loser_error": 0.5,
            "winner_error_diff": 0.05,
            "loser_error_diff": 0.0,
            "gradient_weight": 25.0,
            "gradient_weight_at_zero": 30.0,
        }
    )
    assert all(type(value) is float for value in metrics.values())


def test_a_gradient_weight_counts_by_its_size_whatever_its_sign():
    one = column(1.0, 1.0)
    terms = StepTerms(loss=one, gradient_weight=column(3, -1), gradient_weight_at_zero=one, margin=one)
    pair = PairErrors(one, one)
    assert step_metrics(torch.tensor([5, 5]), pair, pair, terms, 1000)["gradient_weight"] == 2


def test_each_tenth_of_the_timesteps_has_its_own_means_and_an_empty_one_has_none(metrics):
    assert {name[-6:] for name in metrics if "_t" in name} == {"_t0100", "_t0200", "_t1000"}
    assert [metrics[f"gradient_weight_t{last}"] for last in ("0100", "0200", "1000")] == [15.0, 30.0, 40.0]
    assert [metrics[f"margin_t{last}"] for last in ("0100", "0200", "1000")] == pytest.approx(
        [0.05, 0.0, 0.5]
    )
    assert metrics["implicit_accuracy_t0100"] == 0.5
    assert metrics["winner_error_diff_t1000"] == pytest.approx(0.2)


@pytest.mark.parametrize("timesteps", [3, 10, 37, 1000])
def test_every_timestep_has_a_tenth_named_by_the_last_timestep_in_it(timesteps):
    last = {}
    for t in range(1, timesteps + 1):
        one = column(1.0)
        pair = PairErrors(one, one)
        terms = StepTerms(*[one] * 5)
        named = [n for n in step_metrics(torch.tensor([t]), pair, pair, terms, timesteps) if "loss_t" in n]
        (name,) = named
        last[name] = t
    assert all(name == f"loss_t{t:04d}" for name, t in last.items())
    assert len(last) == min(10, timesteps)
