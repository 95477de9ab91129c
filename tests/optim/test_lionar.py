"""LionAR: angles and norms by construction, rows by themselves, and what cannot turn."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.optim.test_liona import noise, parameter, run

from allmend.optim import LionA, LionAR, blocks
from allmend.optim.closed_forms import direction_scale


def angles(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Between rows, exact for small ones too."""
    a, b = (t.double() / t.double().norm(dim=-1, keepdim=True) for t in (before, after))
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def expected_angle(lr: float, weight_decay: float, beta: float) -> float:
    return math.sqrt(2 * lr * weight_decay) * direction_scale(beta)


@pytest.mark.parametrize(("lr", "beta"), [(0.01, 0.9), (0.3, 0.0), (0.05, 0.98)])
def test_every_row_turns_by_the_angle_and_keeps_its_norm(lr: float, beta: float) -> None:
    one = parameter(20, 50)
    norms = one.detach().norm(dim=1)
    optimizer = LionAR([one], lr=lr, weight_decay=0.1, beta=beta, norm="fixed")
    for step in range(300):
        before = one.detach().clone()
        run(optimizer, 1, gradient=lambda like, _, step=step: noise(like, step))
        found = angles(before, one.detach())
        assert torch.allclose(found, torch.full_like(found, expected_angle(lr, 0.1, beta)), rtol=2e-4)
    assert torch.allclose(one.detach().norm(dim=1), norms, rtol=1e-5)  # no drift


def test_in_double_precision_angle_and_norm_are_exact_over_a_thousand_steps() -> None:
    one = parameter(6, 40, dtype=torch.float64)
    norms = one.detach().norm(dim=1)
    optimizer = LionAR([one], lr=0.02, norm="fixed")
    for step in range(1000):
        before = one.detach().clone()
        run(optimizer, 1, gradient=lambda like, _, step=step: noise(like, step))
        found = angles(before, one.detach())
        assert torch.allclose(found, torch.full_like(found, expected_angle(0.02, 0.1, 0.9)), rtol=1e-9)
    assert torch.allclose(one.detach().norm(dim=1), norms, rtol=1e-12)


@pytest.mark.parametrize("factor", [0.3, 7.0])
def test_other_factors_of_weights_and_gradients_change_rounding_only(factor: float) -> None:
    one, other = parameter(5, 8), torch.nn.Parameter(parameter(5, 8).detach() * factor)
    run(LionAR([one], lr=0.02), 5)
    run(LionAR([other], lr=0.02), 5, gradient=lambda like, step: noise(like, step) * factor)
    assert torch.allclose(one.detach() * factor, other.detach(), rtol=1e-4, atol=1e-6)


def test_it_turns_towards_the_sign_of_the_momentum() -> None:
    """By brute force: of all directions in the plane of weight and sign, the one that goes down."""
    one = parameter(1, 40)
    w = one.detach().clone().double()
    run(LionAR([one], lr=0.01, beta=0.0, norm="fixed"), 1)
    s = torch.sign(noise(one, 0)).double()
    x = w / w.norm()
    d = s - (s * x).sum() * x
    d /= d.norm()
    theta = expected_angle(0.01, 0.1, 0.0)
    assert torch.allclose(one.double(), w.norm() * (x * math.cos(theta) - d * math.sin(theta)), atol=1e-6)


def test_rows_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    whole, turned = parameter(12, 9), torch.nn.Parameter(parameter(12, 9).detach()[order])
    run(LionAR([whole], lr=0.02), 6)
    run(LionAR([turned], lr=0.02), 6, gradient=lambda like, step: noise(like, step)[order])
    assert torch.equal(whole.detach()[order], turned.detach())
    monkeypatch.setattr(blocks, "BLOCK", 1)
    parts = parameter(12, 9)
    run(LionAR([parts], lr=0.02), 6)
    assert torch.equal(whole, parts)


@given(st.integers(-10, 10), st.integers(-10, 10))
def test_scales_of_weights_and_gradients_do_not_matter(weights: int, gradients: int) -> None:
    one, other = parameter(5, 8), torch.nn.Parameter(parameter(5, 8).detach() * 2.0**weights)
    run(LionAR([one], lr=0.02), 5)
    run(LionAR([other], lr=0.02), 5, gradient=lambda like, step: noise(like, step) * 2.0**gradients)
    assert torch.equal(one.detach() * 2.0**weights, other.detach())


def test_a_matrix_can_turn_as_a_whole() -> None:
    one = parameter(6, 7)
    before = one.detach().clone()
    run(LionAR([one], lr=0.02, per_neuron=False, norm="fixed"), 1)
    (found,) = angles(before.view(1, -1), one.detach().view(1, -1))
    assert found.item() == pytest.approx(expected_angle(0.02, 0.1, 0.9), rel=1e-4)
    assert one.norm().item() == pytest.approx(before.norm().item(), rel=1e-6)


def test_transposed_weights_turn_as_the_others() -> None:
    one, other = parameter(6, 7), torch.nn.Parameter(parameter(6, 7).detach().T.contiguous())
    run(LionAR([one], lr=0.02), 4)
    run(LionAR([{"params": [other], "neuron_dim": 1}], lr=0.02), 4, gradient=lambda like, step: noise(like.T, step).T)
    assert torch.allclose(one.detach().T, other.detach(), atol=1e-7)


def test_stacked_experts_turn_row_by_row() -> None:
    stacked = parameter(3, 4, 5)
    single = torch.nn.Parameter(stacked.detach()[1].clone())
    run(LionAR([stacked], lr=0.02), 3)
    run(LionAR([single], lr=0.02), 3, gradient=lambda like, step: noise(torch.empty(3, 4, 5), step)[1])
    assert torch.allclose(stacked.detach()[1], single.detach(), atol=1e-7)


# --- the schedule


@pytest.mark.parametrize(("power", "share"), [(1.0, 0.5), (0.5, math.sqrt(0.5))])
def test_the_angle_follows_the_learning_rate(power: float, share: float) -> None:
    one = parameter(4, 30)
    optimizer = LionAR([one], lr=0.02, norm="fixed", schedule_power=power)
    optimizer.param_groups[0]["lr"] = 0.01
    before = one.detach().clone()
    run(optimizer, 1)
    assert angles(before, one.detach()).mean().item() == pytest.approx(share * expected_angle(0.02, 0.1, 0.9), rel=1e-4)
    optimizer.param_groups[0]["lr"] = 0.0
    before, momentum = one.detach().clone(), optimizer.state[one]["exp_avg"].clone()
    run(optimizer, 1)
    assert torch.equal(one, before)
    assert not torch.equal(optimizer.state[one]["exp_avg"], momentum)


def test_the_peak_is_kept_by_the_state_and_by_schedulers() -> None:
    one = parameter(4, 4)
    optimizer = LionAR([one], lr=0.02)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)  # lowers it at once
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.002)
    again = LionAR([parameter(4, 4)], lr=0.002)
    again.load_state_dict(optimizer.state_dict())
    for found in (optimizer, again):
        assert found.param_groups[0]["peak_lr"] == 0.02
    late = LionAR([{"params": [parameter(4, 4)], "lr": 0.002, "initial_lr": 0.02}])
    assert late.param_groups[0]["peak_lr"] == 0.02


def test_the_ramp_makes_the_first_angles_smaller() -> None:
    one = parameter(4, 30)
    optimizer = LionAR([one], lr=0.02, norm="fixed", momentum_ramp="mean")
    for step in range(1, 5):
        before = one.detach().clone()
        run(optimizer, 1, gradient=lambda like, _, step=step: noise(like, step))
        wanted = expected_angle(0.02, 0.1, 0.9) * (1 - 0.9**step)
        assert angles(before, one.detach()).mean().item() == pytest.approx(wanted, rel=1e-3)


# --- what cannot turn


@pytest.mark.filterwarnings("ignore:.*rows of a matrix")
def test_zero_rows_vectors_and_rows_of_one_element_step_as_under_liona() -> None:
    matrix, vector, column = parameter(5, 6), parameter(6), parameter(5, 1)
    with torch.no_grad():
        matrix[2] = 0
    run(LionAR([matrix, vector, column], lr=0.02), 4)
    zero, other, narrow = torch.nn.Parameter(torch.zeros(5, 6)), parameter(6), parameter(5, 1)
    run(LionA([{"params": [zero, narrow]}, {"params": [other], "weight_decay": 0.0}], lr=0.02), 4)
    assert torch.allclose(matrix[2], zero[2], atol=1e-7)
    assert torch.equal(vector, other)
    assert torch.allclose(column, narrow, atol=1e-7)


def test_groups_that_do_not_rotate_are_lionas() -> None:
    one, other = parameter(5, 6), parameter(5, 6)
    run(LionAR([{"params": [one], "rotational": False, "weight_decay": 0.0}], lr=0.02), 4)
    run(LionA([other], lr=0.02, weight_decay=0.0), 4)
    assert torch.equal(one, other)


def test_without_a_direction_a_row_stays() -> None:
    one = parameter(3, 4)
    with torch.no_grad():
        one[1] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    before = one.detach().clone()

    def odd(like: torch.Tensor, step: int) -> torch.Tensor:
        found = noise(like, step)
        found[0] = 0  # nothing asks it to move
        found[1] = before[1]  # along the weight itself
        return found

    run(LionAR([one], lr=0.02, norm="fixed"), 3, gradient=odd)
    assert torch.allclose(one[:2], before[:2], atol=1e-6)
    assert not torch.allclose(one[2], before[2], atol=1e-3)


# --- norms that are learned, and norms that others change


def test_a_gain_goes_against_the_radial_gradient_and_stays_without_one() -> None:
    for along, sign in ((1.0, -1), (-1.0, 1), (0.0, 0)):
        one = parameter(1, 30)
        x = (one.detach() / one.detach().norm()).clone()
        side = noise(one, 7) - (noise(one, 7) * x).sum() * x
        optimizer = LionAR([one], lr=0.02, beta=0.0)
        run(optimizer, 1, gradient=lambda like, step, a=along, x=x, side=side: side.double().float() + a * x)
        gain = optimizer.state[one]["gain"].item()
        if sign:
            assert gain == pytest.approx(1 + sign * 0.02)
        else:
            assert abs(gain - 1) <= 0.02 + 1e-6  # rounding alone decides the sign of what should be 0


def test_refreshed_norms_are_those_of_the_weights_now() -> None:
    one = parameter(5, 6)
    optimizer = LionAR([one], lr=0.02, norm="fixed")
    run(optimizer, 2)
    with torch.no_grad():
        one.mul_(0.5)  # as an average of clients' rows is shorter than they are
    halved = one.detach().norm(dim=1)
    optimizer.refresh_norms()
    run(optimizer, 2)
    assert torch.allclose(one.detach().norm(dim=1), halved, rtol=1e-5)
    learned = LionAR([one], lr=0.02)
    run(learned, 3)
    gains = learned.state[one]["gain"].clone()
    learned.refresh_norms()
    assert torch.equal(learned.state[one]["gain"], gains)
    assert torch.allclose(learned.state[one]["row_norm"] * gains, one.detach().norm(dim=1, keepdim=True), rtol=1e-5)


# --- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_decay": 0.0}, "they would never turn"),
        ({"lr": 10.0, "weight_decay": 1.0, "beta": 0.0}, "a quarter turn or more"),
        ({"norm": "free"}, "norm must be one of"),
        ({"schedule_power": 2.0}, "schedule_power must be one of"),
        ({"neuron_dim": 2}, "neuron_dim must be one of"),
        ({"beta": 1.0}, "beta must lie in"),
    ],
)
def test_what_makes_no_run_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LionAR([parameter(2, 3)], **options)


def test_a_decay_of_zero_is_no_matter_where_nothing_turns() -> None:
    LionAR([parameter(3)], weight_decay=0.0)
    LionAR([{"params": [parameter(3, 3)], "rotational": False}], weight_decay=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_states_survive_saving_in_their_own_type(dtype: torch.dtype) -> None:
    one, again = parameter(4, 5, dtype=dtype), parameter(4, 5, dtype=dtype)
    optimizer = LionAR([one], lr=0.02)
    run(optimizer, 3)
    with torch.no_grad():
        again.copy_(one)
    copied = LionAR([again], lr=0.02)
    copied.load_state_dict(optimizer.state_dict())
    for name in ("exp_avg", "row_norm", "gain", "radial_exp_avg"):
        assert copied.state[again][name].dtype == torch.float32
        assert torch.equal(copied.state[again][name], optimizer.state[one][name])
    for found in (optimizer, copied):
        run(found, 2, gradient=lambda like, step: noise(like, step + 3))
    assert torch.equal(one, again)
