"""Scores under each damping are those of the method with that damping."""

import pytest
import torch
from tests.influence.test_methods import made

from allmend.errors import UserError
from allmend.influence.damping_sweep import SWEEP, sweep
from allmend.influence.gradients import Given
from allmend.influence.kept import Counted
from allmend.influence.methods import DataInf, Exact, Gfim, HessianFree, Method
from allmend.influence.scores import influence


@pytest.mark.parametrize("kind", [Gfim, Exact, DataInf])
def test_each_is_the_method_with_that_damping(kind: type[Method]) -> None:
    train, target = made(20), made(6, seed=1)
    groups = [("x",), ("y", "z"), ("x",), ("y",), ("z",), ("x",)]
    found = sweep(train, target, kind(), groups=groups)
    assert tuple(found) == SWEEP
    for damping, scores in found.items():
        alone = influence(train, target, kind(damping=damping), groups=groups)  # type: ignore[call-arg]
        assert scores.targets == alone.targets == ("x", "y", "z")
        assert torch.allclose(scores.values, alone.values, rtol=1e-9)
        assert scores.solved.damping == pytest.approx(alone.solved.damping)
        assert scores.solved.figures == alone.solved.figures


def test_blocks_are_formed_once_and_all_dampings_share_the_last_pass() -> None:
    train = Counted(made(20))
    sweep(train, made(6, seed=1), Gfim())
    assert train.passes == 2


def test_a_large_damping_comes_to_hessian_free() -> None:
    train, target = (Given({"a": one.gradients["a"]}) for one in (made(20), made(6, seed=1)))
    found = sweep(train, target, Gfim(), [1e6])[1e6]
    plain = influence(train, target, HessianFree()).values
    assert torch.allclose(found.values * found.solved.damping["a"], plain, rtol=1e-4)


def test_a_method_without_damping_is_told() -> None:
    with pytest.raises(UserError, match="hessian_free has no damping to vary"):
        sweep(made(5), made(2, seed=1), HessianFree())
    with pytest.raises(ValueError, match="no training record"):
        sweep(Given({"a": torch.zeros(0, 2, 3)}), made(2, seed=1), Gfim())
