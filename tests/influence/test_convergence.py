"""The simulation against the algebra of each approximation."""

import pytest
import torch

from allmend.influence.convergence import FINE, Convergence, simulate
from allmend.influence.inverses import schulz_steps


@pytest.fixture(scope="module")
def found() -> Convergence:
    return simulate(24, seed=3)


def test_residuals_are_those_of_the_recursion(found: Convergence) -> None:
    """R_{k+1} = R_k^p: from the same start, step 2 of order 2 is step 1 of order 4."""
    two, three, four = (found.residual[order] for order in (2, 3, 4))
    assert two[0] == three[0] == four[0]
    assert [four[step] for step in (1, 2, 3)] == pytest.approx([two[step] for step in (2, 4, 6)], rel=1e-6)
    assert all(one[-1] <= FINE for one in (two, three, four))
    for one in (two, three, four):
        assert list(one) == sorted(one, reverse=True)


def test_errors_vanish_with_the_residual_for_the_iteration_alone(found: Convergence) -> None:
    for errors in found.error.values():
        assert errors[-1] < 1e-8
    assert found.lissa[0] > found.lissa[-1] > 1e-3
    later = list(found.lissa_later.values())
    assert later[0] > later[1]
    assert found.datainf > found.lissa_later[1000]
    arrived = found.arrival(2, 1e-6)
    assert arrived is not None
    assert found.error[2][arrived] <= 1e-6 < found.error[2][arrived - 1]
    assert found.arrival(2, 0.0) is None


def test_without_an_inverse_the_mean_eigenvalue_is_the_better_scale(found: Convergence) -> None:
    """The iteration begins with v over ‖A‖_∞, which is above the mean eigenvalue, and so with too short an x."""
    assert all(found.uncurved < errors[0] < 1 for errors in found.error.values())
    assert found.uncurved < found.lissa[0]


def test_the_steps_are_about_those_of_the_formula(found: Convergence) -> None:
    """κ' = ‖A‖_∞ / λ_min is between κ and √d κ."""
    fewest, most = (schulz_steps(found.condition * factor, 1.0, FINE) for factor in (1.0, 24**0.5))
    assert fewest - 1 <= len(found.residual[2]) - 1 <= most + 1


def test_the_seed_decides(found: Convergence) -> None:
    assert simulate(24, seed=3) == found
    assert simulate(24, seed=4) != found
    assert torch.get_default_dtype() == torch.float32
