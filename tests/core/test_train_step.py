from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError, NonFiniteError
from dde_core.schedule import Schedule, add_noise
from dde_core.train_step import PairBatch, PairErrors, check_finite, pair_errors, step_losses
from tests.support.tiny_unet import tiny_unet

DPO = ObjectiveConfig(method="uniform")
DDE = ObjectiveConfig(method="dde")


class TinyUnet(nn.Module):
    """A U-Net's signature around one convolution; remembers what it was called with."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.calls = []

    def forward(self, sample, timestep, encoder_hidden_states):
        self.calls.append((sample, timestep, encoder_hidden_states))
        text = encoder_hidden_states.mean(dim=(1, 2)) + (timestep / 1000).to(sample.dtype)
        return SimpleNamespace(sample=self.conv(sample) + text[:, None, None, None])


def pairs(b=4, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    text = {"encoder_hidden_states": torch.randn(b, 7, 32, dtype=dtype)}
    return PairBatch(
        pair_ids=tuple(f"pair-{i}" for i in range(b)),
        t=torch.randint(1, 1001, (b,)),
        share=torch.ones(b),
        **{
            name: torch.randn(b, 4, 8, 8, dtype=dtype)
            for name in ("latents_w", "latents_l", "noise_w", "noise_l")
        },
        conditioning_w=text,
        conditioning_l=text,
    )


def run(policy, reference, schedule, batch, config, correction=None):
    theta = pair_errors(policy, schedule, batch)
    with torch.no_grad():
        ref = pair_errors(reference, schedule, batch)
    return step_losses(theta, ref, batch.t, config, schedule, correction)


def test_one_forward_sees_winners_then_losers_with_repeated_text_at_t_minus_1(schedule):
    batch, unet = pairs(b=3), TinyUnet(1)
    pair_errors(unet, schedule, batch)
    ((sample, timestep, text),) = unet.calls
    assert torch.equal(sample[:3], add_noise(schedule, batch.latents_w, batch.noise_w, batch.t))
    assert torch.equal(sample[3:], add_noise(schedule, batch.latents_l, batch.noise_l, batch.t))
    assert torch.equal(timestep, torch.cat([batch.t, batch.t]) - 1)
    assert torch.equal(text, batch.conditioning_w["encoder_hidden_states"].repeat(2, 1, 1))


def test_errors_are_means_of_squares_over_latent_elements_and_carry_a_gradient(schedule):
    batch = pairs()
    zero = lambda x, t, **_: SimpleNamespace(sample=torch.zeros_like(x, requires_grad=True))  # noqa: E731
    errors = pair_errors(zero, schedule, batch)
    torch.testing.assert_close(errors.w, batch.noise_w.square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(errors.l, batch.noise_l.square().mean(dim=(1, 2, 3)))
    assert errors.w.dtype == torch.float32
    assert errors.w.requires_grad


def test_a_half_precision_model_is_reduced_in_float32_and_a_double_one_in_float64(schedule):
    half = pair_errors(TinyUnet(1).bfloat16(), schedule, pairs(dtype=torch.bfloat16))
    full = pair_errors(TinyUnet(1).double(), schedule, pairs(dtype=torch.float64))
    assert half.w.dtype == torch.float32
    assert full.w.dtype == torch.float64
    assert (half.w.bfloat16().float() != half.w).any()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_model_that_is_right_has_no_error_whatever_it_predicts(sd_config, prediction_type):
    schedule = Schedule.from_config(sd_config | {"prediction_type": prediction_type})
    batch = pairs()

    def oracle(x_t, timestep, encoder_hidden_states):
        x0, eps = torch.cat([batch.latents_w, batch.latents_l]), torch.cat([batch.noise_w, batch.noise_l])
        alpha_bar = schedule.alpha_bar[timestep + 1].float().view(-1, 1, 1, 1)
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
        return SimpleNamespace(sample=eps if prediction_type == "epsilon" else v)

    errors = pair_errors(oracle, schedule, batch)
    assert torch.cat([errors.w, errors.l]).max() < 1e-10


def test_a_real_unet_gives_each_pair_the_same_errors_alone_and_in_a_batch(schedule):
    unet, batch = tiny_unet(), pairs()
    with torch.no_grad():
        whole = pair_errors(unet, schedule, batch)
        for i in range(4):
            alone = pair_errors(unet, schedule, batch.rows(slice(i, i + 1)))
            got, expected = torch.cat([alone.w, alone.l]), torch.stack([whole.w[i], whole.l[i]])
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    assert whole.w.std() > 1e-3


def test_a_policy_wrapped_for_distributed_training_gets_the_gradient_of_the_bare_one(schedule, tmp_path):
    bare, wrapped, reference, batch = tiny_unet(), tiny_unet(), TinyUnet(2), pairs()
    config = ObjectiveConfig(method="uniform", beta=5.0)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        policy = nn.parallel.DistributedDataParallel(wrapped)
        (
            run(policy, reference, schedule, batch, config).loss.sum() / 4 * distributed.get_world_size()
        ).backward()
    finally:
        distributed.destroy_process_group()
    run(bare, reference, schedule, batch, config).loss.mean().backward()
    for p, q in zip(wrapped.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)
    assert bare.conv_out.weight.grad.norm() > 1e-3


def test_the_terms_are_those_of_the_formula(schedule):
    t = torch.tensor([1, 500, 1000])
    theta = PairErrors(torch.tensor([0.10, 0.20, 0.30]), torch.tensor([0.15, 0.25, 0.35]))
    ref = PairErrors(torch.tensor([0.11, 0.21, 0.31]), torch.tensor([0.14, 0.27, 0.34]))
    c = torch.tensor([3e-4, 2e-4, 1e-4], dtype=torch.float64)
    terms = step_losses(theta, ref, t, ObjectiveConfig(method="dde", beta=1.0), schedule, c)
    w = (1 - schedule.alpha_bar[t]) / schedule.alpha_bar[t]
    margin = torch.tensor([0.02, -0.01, 0.02], dtype=torch.float64)
    logit = w * margin + c
    torch.testing.assert_close(terms.margin, margin, rtol=0, atol=1e-7)
    torch.testing.assert_close(terms.logit, logit, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms.loss, -logit.sigmoid().log(), rtol=1e-4, atol=0)
    torch.testing.assert_close(terms.gradient_weight, w * (-logit).sigmoid(), rtol=1e-4, atol=0)


def test_dde_needs_a_correction_and_uniform_does_not_read_one(schedule):
    errors, t = PairErrors(torch.tensor([0.1]), torch.tensor([0.2])), torch.tensor([500])
    with pytest.raises(ConfigError, match="correction is needed by method 'dde', got None"):
        step_losses(errors, errors, t, DDE, schedule)
    assert step_losses(errors, errors, t, DPO, schedule, torch.ones(1, dtype=torch.float64)).logit == 0


def test_the_weight_cap_of_the_config_reaches_the_loss(schedule):
    errors, t = PairErrors(torch.tensor([0.1]), torch.tensor([0.2])), torch.tensor([1000])
    zero = torch.zeros(1, dtype=torch.float64)
    free = step_losses(errors, errors, t, DDE, schedule, zero)
    capped = step_losses(errors, errors, t, ObjectiveConfig(method="dde", max_weight=8.0), schedule, zero)
    assert capped.gradient_weight.item() == 4.0
    assert free.gradient_weight.item() == pytest.approx(106.794, abs=1e-3)


def test_one_step_down_the_gradient_raises_the_margins(schedule):
    batch, policy, reference = pairs(b=8), TinyUnet(1), TinyUnet(1)
    run(policy, reference, schedule, batch, DPO).loss.mean().backward()
    with torch.no_grad():
        for p in policy.parameters():
            p -= 1e-5 * p.grad / p.grad.norm()
    assert run(policy, reference, schedule, batch, DPO).margin.mean() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(bad):
    check_finite("gradient norm", torch.ones(3))
    with pytest.raises(NonFiniteError, match="loss is not finite in 1 of 3 values"):
        check_finite("loss", torch.tensor([0.0, bad, 1.0]))
