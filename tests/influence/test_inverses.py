"""Inverses against each other, against closed forms, and where they must give up."""

import math
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmend.influence.inverses import (
    INVERSES,
    NotInvertedError,
    approximations,
    cholesky,
    iterate,
    mean_residual,
    schulz_steps,
    spectral_filter,
)


def matrices(b: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Positive definite, with a spectrum that falls like a power law."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(b, d, d, generator=generator, dtype=torch.float64))
    values = torch.arange(1, d + 1, dtype=torch.float64) ** -1.0 + 0.02
    return ((q * values) @ q.mT).to(dtype)


@given(st.sampled_from(sorted(INVERSES)), st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_each_solves(name: str, b: int, d: int, k: int, seed: int) -> None:
    a = matrices(b, d, seed)
    right = torch.randn(b, d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(a @ INVERSES[name](a, right), right, atol=1e-8)


@pytest.mark.parametrize("name", ["cholesky", "eigen"])
def test_what_is_not_positive_definite_is_refused(name: str) -> None:
    a = matrices(2, 4)
    a[1] -= 2 * torch.eye(4)
    least = float(torch.linalg.eigvalsh(a[1])[0])
    with pytest.raises(NotInvertedError, match="not positive definite") as raised:
        INVERSES[name](a, torch.ones(2, 4, 1, dtype=torch.float64))
    assert f"the smallest eigenvalue is {least:.3g}" in str(raised.value)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_broken_off_iteration_is_a_filter_of_eigenvalues(steps: int) -> None:
    (a,) = matrices(1, 10)
    values, vectors = torch.linalg.eigh(a)
    start = float(1 / torch.linalg.matrix_norm(a, ord=math.inf))
    (x, r) = next(islice(approximations(a[None]), steps, None))
    filtered = (vectors * spectral_filter(values, start, steps)) @ vectors.T
    assert torch.allclose(x[0], filtered, atol=1e-9)
    assert torch.allclose(r[0], torch.eye(10, dtype=torch.float64) - a @ x[0], atol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_residuals_are_powers_of_the_first(order: int) -> None:
    """R_k = R_0^(p^k)."""
    a = matrices(1, 8)
    found = [r for _, r in islice(approximations(a, order=order), 4)]
    for step, r in enumerate(found):
        assert torch.allclose(r, torch.linalg.matrix_power(found[0], order**step), atol=1e-10)
    assert mean_residual(torch.eye(8)[None].repeat(3, 1, 1)) == pytest.approx(1)


def test_a_start_beyond_two_over_the_largest_eigenvalue_diverges_and_is_not_taken() -> None:
    a = matrices(1, 8)
    beyond = 2.1 / float(torch.linalg.eigvalsh(a[0])[-1]) * torch.eye(8, dtype=torch.float64)[None]
    residuals = [mean_residual(r) for _, r in islice(approximations(a, start=beyond), 12)]
    assert residuals[-1] > 1e6
    assert iterate(a, start=beyond).steps == iterate(a).steps


def test_orders_agree_and_take_the_steps_of_the_formula() -> None:
    a = matrices(1, 24)
    found = {order: iterate(a, order=order) for order in (2, 3, 4)}
    for order in (3, 4):
        assert torch.allclose(found[order].inverse, found[2].inverse, atol=1e-8)
        assert found[order].steps < found[2].steps
    low = float(torch.linalg.eigvalsh(a[0])[0])
    high = float(torch.linalg.matrix_norm(a[0], ord=math.inf))
    for tol in (1e-1, 1e-3, 1e-6):
        assert abs(iterate(a, tol=tol).steps - schulz_steps(high, low, tol)) <= 1


def test_a_start_nearby_saves_steps_and_one_far_away_is_not_taken() -> None:
    a = matrices(1, 16)
    whole = iterate(a)
    near = iterate(a * 1.01, start=whole.inverse)
    assert near.steps < whole.steps / 2
    far = iterate(a, start=50 * whole.inverse)
    assert torch.allclose(far.inverse, whole.inverse, atol=1e-9)
    assert far.steps == whole.steps


def test_an_iteration_that_goes_nowhere_says_so() -> None:
    a = matrices(1, 6)
    with pytest.raises(NotInvertedError, match="has not converged after 2 steps"):
        iterate(a, max_steps=2)
    with pytest.raises(NotInvertedError, match=r"does not converge|not converged"):
        iterate(a - 0.5 * torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="order of 2 or more"):
        iterate(a, order=1)


@pytest.mark.parametrize("name", sorted(INVERSES))
def test_in_single_precision_the_error_is_bounded_by_the_condition(name: str) -> None:
    a = matrices(1, 40, dtype=torch.float32)
    right = torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(1))
    exact = torch.linalg.solve(a.double(), right.double())
    error = torch.linalg.vector_norm(INVERSES[name](a, right).double() - exact) / torch.linalg.vector_norm(exact)
    assert error <= 4 * float(torch.linalg.cond(a.double()[0])) * torch.finfo(torch.float32).eps + 2e-5


def test_cholesky_takes_what_is_symmetric_of_a_matrix() -> None:
    a = matrices(1, 5)
    skew = torch.triu(torch.ones(5, 5, dtype=torch.float64), 1)
    right = torch.ones(1, 5, 1, dtype=torch.float64)
    assert torch.allclose(cholesky(a + skew - skew.T, right), cholesky(a, right))
