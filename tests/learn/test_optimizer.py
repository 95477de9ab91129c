"""`Descent`: each optimiser by its name, what begins anew and what goes on, and the sizes of steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from allmend.learn.optimizer import Descent
from allmend.optim import LionA, LionAR
from allmend.optim.closed_forms import direction_scale, first_step_spike
from allmend.optim.ramp import ramp_factor
from allmend.recipe import Train


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def descent(model: nn.Module, start: Any = None, **settings: Any) -> Descent:
    return Descent(model, dict(model.named_parameters()), Train(**settings), start)


def steps(it: Descent, numbers: range, rate: float = 0.01) -> list[Any]:
    found = []
    for number in numbers:
        for place, parameter in enumerate(it.parameters.values()):
            generator = torch.Generator().manual_seed(100 * number + place)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        found.append(it.step(rate))
    return found


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


OPTIMIZERS = pytest.mark.parametrize("name", ["adamw", "radam", "sgd", "liona", "lionar"])


@OPTIMIZERS
def test_a_state_that_is_put_back_goes_on_bit_for_bit(name: str) -> None:
    whole, parts = network(), network()
    steps(descent(whole, optimizer=name, weight_decay=0.1), range(6))
    first = descent(parts, optimizer=name, weight_decay=0.1)
    steps(first, range(3))
    steps(descent(parts, first.state(), optimizer=name, weight_decay=0.1), range(3, 6))
    # LionAR takes rows' norms anew, since they may have been averaged: equal up to rounding
    assert torch.equal(weights(whole), weights(parts)) or name == "lionar"
    assert torch.allclose(weights(whole), weights(parts), atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("liona", LionA), ("lionar", LionAR)])
def test_ours_are_ours(name: str, kind: Callable[..., Any]) -> None:
    ours, plain = network(), network()
    steps(descent(ours, optimizer=name, weight_decay=0.1, learning_rate=0.01), range(4))
    from allmend.optim import build_optimizer

    options = {"norm": "fixed"} if name == "lionar" else {}
    optimizer = build_optimizer(name, plain, lr=0.01, weight_decay=0.1, **options)
    for number in range(4):
        for place, parameter in enumerate(plain.parameters()):
            generator = torch.Generator().manual_seed(100 * number + place)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    assert torch.equal(weights(ours), weights(plain))


@OPTIMIZERS
def test_a_ramp_shortens_the_first_steps_by_its_factor(name: str) -> None:
    moved = {}
    for state in ("reset", "ramp"):
        model = network()
        before = weights(model)
        decay = 0.1 if name == "lionar" else 0.0  # which no ramp of ours shortens
        steps(descent(model, optimizer=name, optimizer_state=state, weight_decay=decay), range(1))
        moved[state] = (weights(model) - before).norm().item()
    shorter = moved["ramp"] / moved["reset"]
    assert shorter == pytest.approx(ramp_factor("mean", 0.9, 1), rel=0.05)


def test_the_sizes_of_steps_are_seen_as_seldom_as_told() -> None:
    found = steps(descent(network(), log_updates=True, weight_decay=0.1), range(20))
    assert [place + 1 for place, size in enumerate(found) if size] == [1, 2, 3, 10, 20]
    first, last = found[0], found[-1]
    assert first.length / last.length == pytest.approx(first_step_spike(0.9), rel=0.35)  # with few parameters
    assert first.matrices == 2
    assert first.far == 2  # the spike turns both rows far
    assert first.farthest in ("0.weight", "2.weight")
    assert steps(descent(network()), range(3)) == [None] * 3
    (plain, *_) = steps(descent(network(), log_updates=True), range(1))
    assert (plain.matrices, plain.far) == (0, 0)  # without decay there is no equilibrium


def test_lionas_steps_have_one_size() -> None:
    model = network()
    count = sum(parameter.numel() for parameter in model.parameters())
    found = steps(descent(model, optimizer="liona", log_updates=True), range(10))
    lengths = [size.length for size in found if size]
    assert lengths == pytest.approx([0.01 * direction_scale(0.9) * count**0.5] * 4, rel=1e-4)
