"""What LionA and LionAR have in common: skipping, single precision beside the weights, compensation, compiled steps."""

import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tests.optim.test_liona import noise, parameter, run

from allmend.optim import LionA, LionAR
from allmend.optim.closed_forms import compensation, direction_scale

BOTH = pytest.mark.parametrize("kind", [LionA, LionAR])


@BOTH
def test_a_step_with_a_gradient_that_is_no_number_can_be_skipped_and_is_counted(kind: type[LionA]) -> None:
    one = parameter(4, 4)
    optimizer = kind([one], lr=0.01, nonfinite="skip")
    one.grad = torch.full((4, 4), math.nan)
    optimizer.step()
    assert optimizer.skipped == 1
    assert torch.equal(one, parameter(4, 4))
    run(optimizer, 1)
    assert optimizer.skipped == 1
    assert not torch.equal(one, parameter(4, 4))
    assert pickle.loads(pickle.dumps(optimizer)).skipped >= 0


def test_a_loop_that_looks_itself_can_have_it_pass() -> None:
    one = parameter(3)
    optimizer = LionA([one], lr=0.01, nonfinite="pass")
    one.grad = torch.tensor([math.nan, 1.0, 1.0])
    optimizer.step()
    assert optimizer.state[one]["exp_avg"].isnan().tolist() == [True, False, False]  # for good


@BOTH
def test_groups_can_be_added_to_what_was_pickled(kind: type[LionA]) -> None:
    again = pickle.loads(pickle.dumps(kind([parameter(4, 4)], lr=0.01)))
    again.add_param_group({"params": [parameter(3, 3)]})
    run(again, 2)


@BOTH
def test_beside_bfloat16_single_precision_follows_the_run_in_single_precision(kind: type[LionA]) -> None:
    """Its weights are those of single precision, rounded."""
    start = parameter(8, 64).detach().bfloat16()
    low, full = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    optimizer = kind([low], lr=1e-4, master_weights=True)
    run(optimizer, 20, gradient=lambda like, step: noise(like, step).bfloat16().to(like.dtype))
    run(kind([full], lr=1e-4), 20, gradient=lambda like, step: noise(like, step).bfloat16().float())
    master = optimizer.state[low]["master"]
    assert master.dtype == torch.float32
    assert torch.equal(master, full)
    assert torch.equal(low, full.bfloat16())
    copied = kind([torch.nn.Parameter(low.detach().clone())], lr=1e-4, master_weights=True)
    copied.load_state_dict(optimizer.state_dict())
    (state,) = copied.state.values()
    assert torch.equal(state["master"], master)


def test_small_turns_in_bfloat16_are_warned_of_with_the_angle() -> None:
    low = torch.nn.Parameter(parameter(6, 32).detach().bfloat16())
    with pytest.warns(UserWarning, match=r"in bfloat16 is to turn by 1.0e-03 rad a step"):
        run(LionAR([low], lr=LionAR.suggest_lr(torch.nn.Linear(4, 4), target_angle=1e-3)), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(LionAR([low], lr=0.1), 1)
        run(LionAR([low], lr=1e-4, master_weights=True), 1)


def test_rounding_does_to_small_turns_what_the_warning_says() -> None:
    def achieved(angle: float) -> float:
        low = torch.nn.Parameter(parameter(64, 512).detach().bfloat16())
        before = low.detach().double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(LionAR([low], lr=LionAR.suggest_lr(torch.nn.Linear(4, 4), target_angle=angle), norm="fixed"), 1)
        after = low.detach().double()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=1)
        return float(cosine.clamp(max=1).acos().mean()) / angle

    assert achieved(0.02) == pytest.approx(1, abs=0.1)
    assert abs(achieved(3e-4) - 1) > 0.3


def test_a_warmup_is_told_that_it_has_nothing_to_do() -> None:
    optimizer = LionAR([parameter(4, 4)], lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 100)
    with pytest.warns(UserWarning, match="a warmup has nothing to do here"):
        run(optimizer, 1)


def test_rows_of_zeros_are_told() -> None:
    one = parameter(10, 4)
    one.detach()[3] = 0
    with pytest.warns(UserWarning, match=r"10% of the rows of a matrix of shape \(10, 4\) are 0"):
        run(LionAR([one], lr=0.01), 1)


def test_the_suggested_rate_makes_the_angle() -> None:
    model = torch.nn.Linear(40, 30, bias=False)
    before = model.weight.detach().clone()
    lr = LionAR.suggest_lr(model, target_angle=0.03, weight_decay=0.2, beta=0.95)
    run(LionAR(model.parameters(), lr=lr, weight_decay=0.2, beta=0.95, norm="fixed"), 1)
    cosine = torch.nn.functional.cosine_similarity(before.double(), model.weight.detach().double(), dim=1)
    assert torch.allclose(cosine.acos(), torch.tensor(0.03).double(), rtol=1e-3)
    with pytest.raises(ValueError, match="nothing in this model rotates"):
        LionAR.suggest_lr(torch.nn.LayerNorm(3))
    with pytest.raises(ValueError, match="target_angle must lie in"):
        LionAR.suggest_lr(model, target_angle=2.0)


def test_what_was_flattened_has_no_rows() -> None:
    flat = parameter(6, 4)
    flat._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"FSDP1 has flattened parameter 0, .* or set rotational = False"):
        LionAR([flat])
    LionAR([{"params": [flat], "rotational": False}])
    LionA([flat])


# --- compensation of what aligned gradients do to representations


def test_compensation_needs_the_batch_size() -> None:
    for size in (None, 0):
        with pytest.raises(ValueError, match="rrc needs batch_size"):
            LionA([parameter(2)], rrc=True, batch_size=size)


def lengths(signal: float, *, batch: float, beta: float = 0.9, steps: int = 400) -> Any:
    """Lengths of steps over their length without compensation; gradients have signal Φ = `signal`."""
    generator = np.random.default_rng(0)
    one = torch.nn.Parameter(torch.zeros(40, 50, dtype=torch.float64))
    mean = torch.ones(40, 50, dtype=torch.float64) * math.sqrt(signal / 2000)
    optimizer = LionA([one], lr=1.0, weight_decay=0, beta=beta, rrc=True, batch_size=batch)
    found = []
    for _ in range(steps):
        before = one.detach().clone()
        one.grad = mean + torch.from_numpy(generator.normal(size=(40, 50))) / math.sqrt(2000)
        optimizer.step()
        found.append((one.detach() - before).norm().item())
    return np.array(found) / (direction_scale(beta) * math.sqrt(2000))


@pytest.mark.parametrize("signal", [0.0, 0.2, 0.8, 5.0])
def test_steps_are_shorter_by_the_factor_of_the_gradients_signal(signal: float) -> None:
    found = lengths(signal, batch=32)
    assert found[0] == pytest.approx(1 / math.sqrt(32))  # nothing is known yet
    assert found[100:].mean() == pytest.approx(compensation(signal, 32), rel=0.03)
    assert (1 / math.sqrt(32) - 1e-9 <= found).all()
    assert (found <= 1 + 1e-9).all()


def test_compensation_shrinks_turns_and_goes_on_after_saving() -> None:
    options: dict[str, Any] = {"lr": 0.02, "rrc": True, "batch_size": 16, "norm": "fixed"}
    one, again = parameter(10, 20), parameter(10, 20)
    optimizer = LionAR([one], **options)
    run(optimizer, 1)
    plain = parameter(10, 20)
    run(LionAR([plain], lr=0.02, norm="fixed"), 1)
    start = parameter(10, 20).detach()
    turned, whole = ((two.detach() - start).norm(dim=1) for two in (one, plain))
    assert torch.allclose(turned, whole / 4, rtol=1e-2)
    with torch.no_grad():
        again.copy_(one)
    copied = LionAR([again], **options)
    copied.load_state_dict(optimizer.state_dict())
    for two in (optimizer, copied):
        run(two, 3, gradient=lambda like, step: noise(like, step + 1))
    assert torch.equal(one, again)


# --- compiled


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("options", [{}, {"nesterov": True, "maximize": True}, {"momentum_ramp": "mean"}])
def test_compiled_steps_are_the_same(kind: type[LionA], options: dict[str, Any]) -> None:
    shapes = [(33, 20), (64, 48), (7,), (3, 5, 16)]
    ours, plain = ([parameter(*shape, seed=n) for n, shape in enumerate(shapes)] for _ in range(2))
    run(kind(ours, lr=0.02, compiled=True, **options), 8)
    run(kind(plain, lr=0.02, **options), 8)
    for mine, other in zip(ours, plain, strict=True):
        assert torch.allclose(mine, other, atol=1e-6, rtol=1e-6)
