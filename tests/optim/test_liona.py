"""LionA: lengths in closed form, Lion as an oracle, and an optimiser's manners."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmend.optim import LionA, blocks
from allmend.optim.closed_forms import direction_scale
from allmend.optim.ramp import RAMPS, ramp_factor


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def noise(like: torch.Tensor, step: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1000 + step)).to(like.dtype)


def run(optimizer: torch.optim.Optimizer, steps: int, *, gradient: Callable[[torch.Tensor, int], Any] = noise) -> None:
    for step in range(steps):
        for group in optimizer.param_groups:
            for one in group["params"]:
                one.grad = gradient(one, step)
        optimizer.step()


@given(st.floats(0, 0.99), st.booleans(), st.sampled_from(RAMPS), st.integers(1, 5))
def test_without_decay_a_step_has_the_length_of_adamws_in_noise(
    beta: float, nesterov: bool, ramp: Any, steps: int
) -> None:
    one = parameter(6, 7, dtype=torch.float64)
    optimizer = LionA([one], lr=0.01, weight_decay=0, beta=beta, nesterov=nesterov, momentum_ramp=ramp)
    for step in range(steps):
        before = one.detach().clone()
        run(optimizer, 1, gradient=lambda like, _, step=step: noise(like, step))
        length = 0.01 * direction_scale(beta, nesterov=nesterov) * ramp_factor(ramp, beta, step + 1) * math.sqrt(42)
        assert (one.detach() - before).norm().item() == pytest.approx(length, rel=1e-12)


def lion(w: Any, gradients: list[Any], *, rate: float, decay: float, beta1: float, beta2: float) -> Any:
    """Lion as its paper has it (Chen et al., 2023), in NumPy."""
    m = np.zeros_like(w)
    for g in gradients:
        c = beta1 * m + (1 - beta1) * g
        w = w - rate * (np.sign(c) + decay * w)
        m = beta2 * m + (1 - beta2) * g
    return w


@pytest.mark.parametrize("nesterov", [False, True])
def test_it_is_lion_with_one_momentum_at_another_scale(nesterov: bool) -> None:
    one, beta, lr, decay = parameter(40, 30, dtype=torch.float64), 0.9, 0.01, 0.1
    start = one.detach().numpy().copy()
    run(LionA([one], lr=lr, weight_decay=decay, beta=beta, nesterov=nesterov), 30)
    gradients = [noise(one, step).numpy() for step in range(30)]
    rate = lr * direction_scale(beta, nesterov=nesterov)
    # Nesterov's direction β m_t + (1−β) g_t is Lion's mix with β₁ = β²; m_t itself is that with β₁ = β
    beta1 = beta**2 if nesterov else beta
    expected = lion(start, gradients, rate=rate, decay=lr * decay / rate, beta1=beta1, beta2=beta)
    assert np.allclose(one.detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_how_it_is_cut_into_blocks_changes_no_bit(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = parameter(30, 20), parameter(30, 20)
    run(LionA([whole], lr=0.01), 5)
    monkeypatch.setattr(blocks, "BLOCK", size)
    run(LionA([parts], lr=0.01), 5)
    assert torch.equal(whole, parts)


@given(st.integers(-20, 20))
def test_a_factor_of_the_gradients_changes_nothing(power: int) -> None:
    one, other = parameter(5, 4), parameter(5, 4)
    run(LionA([one], lr=0.01), 6)
    run(LionA([other], lr=0.01), 6, gradient=lambda like, step: noise(like, step) * 2.0**power)
    assert torch.equal(one, other)


def test_rows_that_did_not_occur_stand_still_where_it_is_lazy() -> None:
    one = parameter(6, 3)
    before = one.detach().clone()

    def some(like: torch.Tensor, step: int) -> torch.Tensor:
        found = noise(like, step)
        found[2:] = 0
        return found

    run(LionA([one], lr=0.01, lazy_rows=True), 3, gradient=some)
    assert torch.equal(one[2:], before[2:])
    assert not torch.isclose(one[:2], before[:2]).any()
    other = parameter(6, 3)
    run(LionA([other], lr=0.01), 1, gradient=some)
    assert torch.allclose(other[2:], before[2:] * (1 - 0.01 * 0.1))  # else they decay


def test_maximising_is_minimising_the_opposite() -> None:
    up, down = parameter(4, 4), parameter(4, 4)
    run(LionA([up], maximize=True), 4)
    run(LionA([down]), 4, gradient=lambda like, step: -noise(like, step))
    assert torch.equal(up, down)


# --- an optimiser's manners


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_run_goes_on_bit_for_bit_from_its_state(dtype: torch.dtype, how: str) -> None:
    whole, again = parameter(9, 5, dtype=dtype), parameter(9, 5, dtype=dtype)
    options: dict[str, Any] = {"lr": 0.01, "momentum_ramp": "mean"}
    optimizer = LionA([whole], **options)
    run(optimizer, 3)
    wide = torch.promote_types(dtype, torch.float32)
    assert optimizer.state[whole]["exp_avg"].dtype == wide
    if how == "state_dict":
        with torch.no_grad():
            again.copy_(whole)
        copied = LionA([again], **options)
        copied.load_state_dict(optimizer.state_dict())
    else:
        copied = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        (again,) = copied.param_groups[0]["params"]
    assert copied.state[again]["exp_avg"].dtype == wide
    for one in (optimizer, copied):
        run(one, 3, gradient=lambda like, step: noise(like, step + 3))
    assert torch.equal(whole, again)


def test_schedulers_drive_it() -> None:
    one = parameter(3, 3, dtype=torch.float64)
    optimizer = LionA([one], lr=0.1, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    lengths = []
    for step in range(3):
        before = one.detach().clone()
        run(optimizer, 1, gradient=lambda like, _, step=step: noise(like, step))
        lengths.append((one.detach() - before).norm().item())
        scheduler.step()
    assert lengths == pytest.approx([lengths[0], lengths[0] / 2, lengths[0] / 4])


def test_a_closure_is_called_with_gradients_on_and_its_loss_given_back() -> None:
    one = parameter(3)
    optimizer = LionA([one])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = one.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(parameter(3).square().sum().item())


def test_what_has_no_gradient_is_left_alone() -> None:
    one, other, scalar = parameter(3, 2), parameter(3, 2), torch.nn.Parameter(torch.tensor(2.0))
    other.requires_grad_(False)
    optimizer = LionA([{"params": [one, other]}, {"params": []}, {"params": [scalar]}])
    scalar.grad = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(one, parameter(3, 2))
    assert one not in optimizer.state
    assert scalar < 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_stops_it_before_anything_moves(bad: float) -> None:
    first, second = parameter(4), parameter(4, 4)
    optimizer = LionA([first, second])
    first.grad, second.grad = torch.ones(4), torch.ones(4, 4)
    second.grad[1, 2] = bad
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0, shape \(4, 4\), holds NaN or infinite"):
        optimizer.step()
    assert torch.equal(first, parameter(4))
    second.grad = torch.full((4, 4), 1e38)  # whose norm is beyond single precision, and which are numbers
    first.grad = torch.ones(4)
    optimizer.step()
    second.grad = torch.ones(4, 4).to_sparse()
    with pytest.raises(RuntimeError, match="is sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"lr": math.nan}, "lr must be 0 or more"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"beta": 1.0}, r"beta must lie in \[0, 1\), got 1.0"),
        ({"momentum_ramp": "linear"}, "momentum_ramp must be one of none, mean, random_walk, got 'linear'"),
    ],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LionA([parameter(2)], **options)
    optimizer = LionA([parameter(2)])
    with pytest.raises(ValueError, match="parameter group 1: "):
        optimizer.add_param_group({"params": [parameter(3)], **options})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(2,\) is complex"):
        LionA([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
