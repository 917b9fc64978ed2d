"""The policy's arithmetic and its running average, on both families, whole and with adapters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dde_core.config import LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy, use_deterministic_kernels
from dde_core.models.text import TextEncoders
from dde_core.models.tokens import tokenize
from dde_core.train_step import PairBatch, PairErrors, pair_errors, step_losses
from tests.support.methods import PREFERENCE
from tests.support.tiny_folders import FOLDERS

WAYS = {"whole": None, "lora": LoraConfig(rank=4)}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(FOLDERS[request.param](tmp_path_factory.mktemp("models") / request.param))


@pytest.fixture(params=WAYS)
def lora(request) -> LoraConfig | None:
    return WAYS[request.param]


def pairs(folder: ModelFolder, b: int = 6) -> PairBatch:
    encoders, generator = TextEncoders(folder), torch.Generator().manual_seed(0)
    text = encoders(tokenize(folder.tokenizers(), [f"a red circle number {i}" for i in range(b)]))
    told = encoders.with_sizes(text, np.full((b, 2), 32), np.zeros((b, 2), np.int64), (32, 32))
    names = ("latents_w", "latents_l", "noise_w", "noise_l")
    drawn = {name: torch.randn(b, 4, 8, 8, generator=generator) for name in names}
    t = torch.tensor([1, 2, 200, 500, 999, 1000])[:b]
    return PairBatch(
        pair_ids=tuple(map(str, range(b))),
        t=t,
        share=torch.ones(b),
        **drawn,
        conditioning_w=told,
        conditioning_l=told,
    )


def both(policy: Policy, folder: ModelFolder, batch: PairBatch) -> tuple[PairErrors, PairErrors]:
    """Errors of policy and reference, in the order and under the arithmetic of the training loop."""
    with policy.autocast():
        ref = pair_errors(policy.reference, folder.schedule(), batch)
        return pair_errors(policy.unet, folder.schedule(), batch), ref


# ---- fp32, bf16


def test_fp32_on_a_gpu_is_not_tf32(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    kinds = (torch.backends.cudnn, torch.backends.cuda.matmul)
    for kind in kinds:
        kind.allow_tf32 = True
    use_deterministic_kernels()
    torch.use_deterministic_algorithms(False)
    assert [kind.allow_tf32 for kind in kinds] == [False, False]


def test_bf16_errors_are_reduced_in_float32_and_are_not_those_of_a_bf16_reduction(folder, lora):
    policy, batch, outputs = Policy(folder, TrainConfig(precision="bf16", lora=lora)), pairs(folder), []
    hook = policy.unet.register_forward_hook(lambda module, arguments, output: outputs.append(output.sample))
    with policy.autocast():
        errors = pair_errors(policy.unet, folder.schedule(), batch)
    hook.remove()
    (output,) = outputs
    assert output.dtype == torch.bfloat16, "the U-Net's own arithmetic"
    assert {parameter.dtype for parameter in policy.unet.parameters()} == {torch.float32}
    found, noise = torch.cat([errors.w, errors.l]), torch.cat([batch.noise_w, batch.noise_l])
    assert found.dtype == torch.float32
    exact = (output.double() - noise.double()).square().mean(dim=(1, 2, 3))
    coarse = (output - noise.bfloat16()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    assert coarse.dtype == torch.bfloat16
    assert ((coarse.double() - exact).abs() / exact).max() > 1e-4


def test_bf16_rounds_and_fp32_does_not(folder, lora):
    batch, found = pairs(folder), {}
    for precision in ("fp32", "bf16"):
        found[precision] = both(Policy(folder, TrainConfig(precision=precision, lora=lora)), folder, batch)[
            0
        ].w
    exact = pair_errors(folder.unet().requires_grad_(False), folder.schedule(), batch).w
    torch.testing.assert_close(found["fp32"], exact, rtol=1e-5, atol=0)
    assert (found["bf16"] - exact).abs().max() > 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_at_step_0_every_logit_is_0_to_the_bit(folder, lora, precision):
    policy, batch = Policy(folder, TrainConfig(precision=precision, lora=lora)), pairs(folder)
    theta, ref = both(policy, folder, batch)
    assert theta.w.dtype == ref.w.dtype == torch.float32
    for method in PREFERENCE:
        zero = torch.zeros(len(batch), dtype=torch.float64)
        terms = step_losses(theta, ref, batch.t, ObjectiveConfig(method=method), folder.schedule(), zero)
        assert terms.logit.tolist() == [0.0] * 6
        assert terms.loss.tolist() == [math.log(2)] * 6


def test_a_reference_of_another_arithmetic_would_leave_logits_behind(folder, lora):
    policy, batch = Policy(folder, TrainConfig(precision="bf16", lora=lora)), pairs(folder)
    with torch.no_grad():
        theta, _ = both(policy, folder, batch)
        ref = pair_errors(policy.reference, folder.schedule(), batch)  # outside of the policy's arithmetic
        terms = step_losses(theta, ref, batch.t, ObjectiveConfig(method="uniform"), folder.schedule())
    assert terms.logit.abs().max() > 1e-3


def test_under_bf16_all_that_is_trained_has_a_gradient_although_the_reference_ran_first(folder, lora):
    """autocast caches its casts of weights: those of a pass without gradient must not serve one with it."""
    policy, batch = Policy(folder, TrainConfig(precision="bf16", lora=lora)), pairs(folder)
    theta, ref = both(policy, folder, batch)
    step_losses(
        theta, ref, batch.t, ObjectiveConfig(method="uniform", beta=1.0), folder.schedule()
    ).loss.mean().backward()
    moved = [
        p for name, p in policy.unet.named_parameters() if p.requires_grad and "lora_A" not in name
    ]  # A waits for B
    assert moved
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.parameters())
    assert sum(p.grad.count_nonzero() > 0 for p in moved) > 0.9 * len(moved)


def test_gradient_checkpointing_works_everything_out_again_in_the_same_arithmetic(folder, lora):
    batch, gradients = pairs(folder), []
    for checkpointing in (False, True):
        policy = Policy(
            folder, TrainConfig(precision="bf16", lora=lora, gradient_checkpointing=checkpointing)
        )
        theta, ref = both(policy, folder, batch)
        terms = step_losses(
            theta, ref, batch.t, ObjectiveConfig(method="uniform", beta=1.0), folder.schedule()
        )
        assert (terms.logit == 0).all()
        terms.loss.mean().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    assert all(map(torch.equal, *gradients))


# ---- the running average


def shake(policy: Policy, seed: int) -> None:
    """An optimizer's step, as far as the average knows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def copies(policy: Policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.parameters()]


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_the_average_follows_diffusers_rule_and_the_weights_come_back_to_the_bit(folder, lora, decay):
    policy = Policy(folder, TrainConfig(ema_decay=decay, lora=lora))
    average = [parameter.double() for parameter in copies(policy)]
    used = []
    for step in range(1, 13):
        shake(policy, step)
        policy.ema.step(policy.parameters())
        used.append(
            min(decay, step / (9 + step)) if step > 1 else 0.0
        )  # (1 + n) / (10 + n), the first n being 0: a copy
        average = [
            used[-1] * a + (1 - used[-1]) * p.double() for a, p in zip(average, copies(policy), strict=True)
        ]
    assert used[:3] == pytest.approx([0, 2 / 11, min(decay, 3 / 12)])
    before = copies(policy)
    with policy.averaged():
        within = copies(policy)
    for held, wanted, last, restored in zip(within, average, before, copies(policy), strict=True):
        torch.testing.assert_close(held.double(), wanted, rtol=0, atol=1e-5)
        assert (held - last).abs().max() > 1e-2
        assert torch.equal(restored, last)


def test_the_weights_come_back_after_an_error_too(folder, lora):
    policy = Policy(folder, TrainConfig(ema_decay=0.9, lora=lora))
    for step in range(3):
        shake(policy, step)
        policy.ema.step(policy.parameters())
    before = copies(policy)
    with pytest.raises(KeyboardInterrupt), policy.averaged():
        raise KeyboardInterrupt
    assert all(map(torch.equal, before, copies(policy)))


def test_without_an_average_the_weights_stay_what_they_are(folder, lora):
    policy = Policy(folder, TrainConfig(lora=lora))
    before = copies(policy)
    with policy.averaged():
        assert all(map(torch.equal, before, copies(policy)))
    assert policy.ema is None


def test_the_reference_stays_where_it_is_while_the_policy_and_its_average_move(folder, lora):
    policy, batch = Policy(folder, TrainConfig(ema_decay=0.9, lora=lora)), pairs(folder)
    _, start = both(policy, folder, batch)
    shake(policy, 0)
    policy.ema.step(policy.parameters())
    with policy.averaged():
        theta, within = both(policy, folder, batch)
    _, after = both(policy, folder, batch)
    assert torch.equal(start.w, within.w)
    assert torch.equal(start.l, after.l)
    assert (theta.w - start.w).abs().max() > 1e-3
