"""Pulls against closed forms: the linear system, eigenvalues of the complete graph, one model for all in the limit."""

import pytest
import torch

from allmend.federation.collaboration import pull as module
from allmend.federation.collaboration.graph import laplacian
from allmend.federation.collaboration.pull import largest_strength, pull, pull_weights

from .test_graph import graph


def models(n: int, d: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def complete(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.float64).fill_diagonal_(0)


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_implicit_pull_solves_the_linear_system(strength: float, sparse: bool) -> None:
    w, x = graph(7).double(), models(7)

    found = pull(x, w.to_sparse() if sparse else w, strength)

    expected = torch.linalg.solve(torch.eye(7, dtype=torch.float64) + strength * laplacian(w), x)
    assert torch.allclose(found, expected, atol=1e-6 if sparse else 1e-12, rtol=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_explicit_pull_is_a_step_on_the_differences(sparse: bool) -> None:
    w, x = graph(6).double(), models(6).requires_grad_()
    loss = sum(w[i, j] * (x[i] - x[j]).square().sum() / 2 for i in range(6) for j in range(i))
    (gradient,) = torch.autograd.grad(loss, x)
    x = x.detach()

    found = pull(x, w.to_sparse() if sparse else w, 0.1, method="explicit")

    assert torch.allclose(found, x - 0.1 * gradient, atol=1e-12)


@pytest.mark.parametrize("method", ["implicit", "explicit"])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_mean_stays_where_it_is(method: module.Method, sparse: bool) -> None:
    w, x = graph(9).double(), models(9)

    found = pull(x, w.to_sparse() if sparse else w, 0.05, method=method)

    assert torch.allclose(found.mean(0), x.mean(0), atol=1e-9)


def test_what_members_fitted_and_what_they_share() -> None:
    """With quadratics around a_i the fixed point of steps and pulls is (I + ρL)⁻¹ a: alone at 0, one model at ∞."""
    w, a = graph(6).double(), models(6)
    rho, eta = 0.7, 0.05
    x = torch.zeros_like(a)
    for _ in range(4000):
        x = x - eta * (x - a) + pull(x, w, eta * rho, method="explicit") - x
    expected = torch.linalg.solve(torch.eye(6, dtype=torch.float64) + rho * laplacian(w), a)
    assert torch.allclose(x, expected, atol=1e-9, rtol=0)

    errors = [float((pull(a, w, rho) - a.mean(0)).norm()) for rho in (1e3, 1e4, 1e5)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)
    assert torch.equal(pull(a, w, 0.0), a)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_an_explicit_pull_grows_exactly_beyond_two_over_n_among_all(n: int) -> None:
    assert largest_strength(complete(n)) == pytest.approx(2 / n)
    assert largest_strength(complete(n).to_sparse()) == pytest.approx(2 / n)
    x = models(n)
    within = pull(x, complete(n), 1.99 / n, method="explicit")
    assert (within - within.mean(0)).norm() < (x - x.mean(0)).norm()
    with pytest.raises(ValueError, match=f"{2 / n:.3g} is the most"):
        pull(x, complete(n), 2.01 / n, method="explicit")
    beyond = x - 2.01 / n * laplacian(complete(n)) @ x
    assert (beyond - beyond.mean(0)).norm() > (x - x.mean(0)).norm()


@pytest.mark.parametrize("strength", [0.1, 10.0, 1e6])
def test_an_implicit_pull_never_expands(strength: float) -> None:
    x = models(12)
    found = pull(x, graph(12).double(), strength)

    assert (found - found.mean(0)).norm() <= (x - x.mean(0)).norm()


def test_weights_are_shares_of_members() -> None:
    weights = pull_weights(graph(8), 3.0)

    assert torch.allclose(weights.sum(1), torch.ones(8, dtype=torch.float64))
    assert torch.allclose(weights, weights.T)
    assert weights.min() > 0
    assert torch.equal(pull_weights(torch.zeros(4, 4), 3.0), torch.eye(4, dtype=torch.float64))


def test_blocks_of_coordinates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = models(5, 23).float(), graph(5)
    whole = pull(x, w, 2.0)
    monkeypatch.setattr(module, "BLOCK", 4)

    assert torch.equal(pull(x, w, 2.0), whole)
    assert whole.dtype == torch.float32
