"""Hessian-free over λ: the limit of methods whose damping drowns their curvature."""

import pytest
import torch

from allmend.influence.damping_alone import DampingAlone
from allmend.influence.gradients import Given
from allmend.influence.methods import DataInf, Exact, HessianFree, relative_damping
from allmend.influence.scores import influence


def made(n: int, seed: int) -> Given:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": 1.0, "b": 30.0}  # blocks whose λ differ
    drawn = {
        name: size * torch.randn(n, 2, 4, generator=generator, dtype=torch.float64) for name, size in sizes.items()
    }
    return Given(drawn)


def test_each_block_s_share_of_a_score_is_hessian_free_s_over_its_damping() -> None:
    train, target = made(9, 0), made(3, 1)
    lambdas = relative_damping(train, 0.1)
    expected = sum(
        influence(Given({name: train.gradients[name]}), Given({name: target.gradients[name]}), HessianFree()).values
        / lam
        for name, lam in lambdas.items()
    )
    assert torch.allclose(influence(train, target, DampingAlone()).values, expected, rtol=1e-12)


@pytest.mark.parametrize("method", [Exact, DataInf])
def test_with_a_large_damping_others_come_to_it(method: type[Exact] | type[DataInf]) -> None:
    train, target = made(9, 0), made(3, 1)
    found, alone = (influence(train, target, one(1e7)).values for one in (method, DampingAlone))
    assert torch.allclose(found, alone, rtol=1e-5, atol=1e-6 * float(alone.abs().max()))


def test_a_module_without_gradients_is_left_out_and_named() -> None:
    train, target = made(5, 0), made(2, 1)
    silent = Given({**train.gradients, "b": torch.zeros_like(train.gradients["b"])})
    assert influence(silent, target, DampingAlone()).solved.skipped == ("b",)
