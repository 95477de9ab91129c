"""The ramp: Adam without its first bias correction, beside schedulers, and anew with every new optimiser."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.optim.test_liona import noise, parameter, run

from allmend.optim import LionA, MomentumRamp
from allmend.optim.closed_forms import noise_share
from allmend.optim.ramp import ramp_factor


@given(st.floats(0, 0.99), st.integers(1, 500))
def test_it_rises_to_one(beta: float, step: int) -> None:
    assert ramp_factor("none", beta, step) == 1
    for ramp in ("mean", "random_walk"):
        found = [ramp_factor(ramp, beta, at) for at in (step, step + 1)]  # type: ignore[arg-type]
        assert 0 < found[0] <= found[1] <= 1
    assert ramp_factor("mean", beta, step) <= ramp_factor("random_walk", beta, step) + 1e-15


@given(st.floats(0.01, 0.99), st.integers(1, 100))
def test_in_a_random_walk_adams_steps_are_then_even(beta: float, step: int) -> None:
    """√κ_t is how long they are; the ramp that is for it leaves √κ_∞ up to what the mean's factor adds."""
    even = math.sqrt(noise_share(beta, step)) * ramp_factor("mean", beta, step)
    assert even == pytest.approx(math.sqrt(noise_share(beta)) * ramp_factor("random_walk", beta, step), rel=1e-9)


def test_adam_with_the_mean_ramp_is_adam_without_the_first_bias_correction() -> None:
    one, beta1, beta2, lr = parameter(30, dtype=torch.float64), 0.9, 0.95, 0.01
    w, m, v = one.detach().clone(), torch.zeros(30).double(), torch.zeros(30).double()
    adam = torch.optim.Adam([one], lr=lr, betas=(beta1, beta2), eps=0.0)
    with MomentumRamp(adam):
        run(adam, 12)
    for step in range(12):
        g = noise(one, step)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w -= lr * m / (v / (1 - beta2 ** (step + 1))).sqrt()
    assert torch.allclose(one.detach(), w, atol=1e-12)
    assert adam.param_groups[0]["lr"] == lr


def test_schedulers_see_their_own_learning_rate() -> None:
    one = parameter(3)
    adam = torch.optim.AdamW([one], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(adam, 1, 0.5)
    with MomentumRamp(adam):
        for _ in range(3):
            run(adam, 1)
            scheduler.step()
    assert adam.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


def test_a_step_that_is_broken_off_leaves_the_learning_rate_as_it_was() -> None:
    one = parameter(3)
    liona = LionA([one], lr=0.1, beta=0.9)
    with MomentumRamp(liona):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="NaN"):
                run(liona, 1, gradient=lambda like, step: torch.full_like(like, math.nan))
        run(liona, 1)
    assert liona.param_groups[0]["lr"] == 0.1


def test_a_new_optimiser_begins_its_ramp_anew_and_a_kept_one_goes_on() -> None:
    lengths = []
    for kept in (False, True):
        one = parameter(100)
        adam = torch.optim.Adam([one], lr=0.01)
        with MomentumRamp(adam):
            run(adam, 30)
        state = adam.state_dict()
        again = torch.optim.Adam([one], lr=0.01)
        if kept:
            again.load_state_dict(state)
        before = one.detach().clone()
        with MomentumRamp(again):
            run(again, 1, gradient=lambda like, step: noise(like, 31))
        lengths.append((one.detach() - before).norm().item())
    assert lengths[0] == pytest.approx(0.1 * 0.01 * 10, rel=1e-3)  # 1 − β of a sign of 100 numbers
    assert lengths[1] > 1.5 * lengths[0]


def test_the_momentum_is_found_or_asked_for() -> None:
    sgd = torch.optim.SGD([parameter(2)], lr=0.1, momentum=0.9)
    with MomentumRamp(sgd):
        before = sgd.param_groups[0]["params"][0].detach().clone()
        run(sgd, 1)
        moved = sgd.param_groups[0]["params"][0].detach() - before
        assert torch.allclose(moved, -0.1 * (1 - 0.9) * noise(before, 0), atol=1e-7)
    with pytest.raises(ValueError, match="name one, as MomentumRamp"):
        MomentumRamp(torch.optim.Adagrad([parameter(2)]))
