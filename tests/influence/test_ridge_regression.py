"""Influence against what leaving records out really does, where that has a closed form: ridge regression.

J(w) = (1/n) Σ ½ (x_iᵀw − y_i)² + (λ/2) ‖w‖². Its curvature is Σ x xᵀ / n + λI, the block of "gradients" x_i of one row
with damping λ, and g_i = (x_iᵀw − y_i) x_i is the gradient of record i at the minimum w.
"""

from dataclasses import dataclass

import pytest
import torch

from allmend.influence.blocks import fisher_blocks
from allmend.influence.gradients import Given
from allmend.influence.methods import solve
from allmend.influence.scores import score


@dataclass(frozen=True)
class Ridge:
    """Records (x, y) [n, d] and [n], target records, and λ."""

    x: torch.Tensor
    y: torch.Tensor
    target_x: torch.Tensor
    target_y: torch.Tensor
    lam: float

    def minimum(self, weight: torch.Tensor) -> torch.Tensor:
        """argmin of (1/n) Σ weight_i ½ (x_iᵀw − y_i)² + (λ/2) ‖w‖²."""
        n, d = self.x.shape
        h = (self.x.T * weight) @ self.x / n + self.lam * torch.eye(d, dtype=self.x.dtype)
        return torch.linalg.solve(h, (self.x.T * weight) @ self.y / n)

    def target_loss(self, w: torch.Tensor) -> float:
        return float(0.5 * (self.target_x @ w - self.target_y).square().mean())


@pytest.fixture
def ridge() -> Ridge:
    generator = torch.Generator().manual_seed(0)
    x, target_x = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (120, 20))
    slope = torch.randn(6, generator=generator, dtype=torch.float64)
    noise = torch.randn(120, generator=generator, dtype=torch.float64)
    noise[:12] += 6  # the wrong records
    return Ridge(x, x @ slope + noise, target_x, target_x @ slope, lam=0.05)


def scored(ridge: Ridge) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [n], gradients g [n, d] and w."""
    w = ridge.minimum(torch.ones(len(ridge.x), dtype=torch.float64))
    g = (ridge.x @ w - ridge.y)[:, None] * ridge.x
    v = ((ridge.target_x @ w - ridge.target_y)[:, None] * ridge.target_x).mean(0)
    blocks = fisher_blocks(Given({"w": ridge.x[:, None]}))
    solved = solve(blocks, {"w": v[None, None]}, damping=ridge.lam / blocks.mean_eigenvalue("w"))
    values, _ = score(Given({"w": g[:, None]}), solved.directions)
    return values[:, 0], g, w


def test_leaving_a_record_out_moves_the_weights_by_its_gradient_over_one_minus_its_leverage(ridge: Ridge) -> None:
    """The target's loss moves by score / (1 − h) / n and a quadratic term, exactly."""
    values, g, w = scored(ridge)
    n, d = ridge.x.shape
    h = ridge.x.T @ ridge.x / n + ridge.lam * torch.eye(d, dtype=ridge.x.dtype)
    leverage = (ridge.x @ torch.linalg.inv(h) * ridge.x).sum(1) / n
    curved = ridge.target_x.T @ ridge.target_x / len(ridge.target_x)
    for place in range(n):
        weight = torch.ones(n, dtype=torch.float64)
        weight[place] = 0
        without = ridge.minimum(weight)
        moved = torch.linalg.solve(h, g[place]) / n / (1 - leverage[place])
        assert torch.allclose(without - w, moved, rtol=1e-10, atol=1e-12)
        gain = ridge.target_loss(without) - ridge.target_loss(w)
        first = float(values[place] / n / (1 - leverage[place]))
        assert gain == pytest.approx(first + 0.5 * float(moved @ curved @ moved), rel=1e-10, abs=1e-12)


def test_the_target_s_loss_falls_with_a_record_s_weight_by_its_score(ridge: Ridge) -> None:
    values, _, _ = scored(ridge)
    n, step = len(ridge.x), 1e-4
    for place in range(n):
        losses = []
        for sign in (1, -1):
            weight = torch.ones(n, dtype=torch.float64)
            weight[place] += sign * step
            losses.append(ridge.target_loss(ridge.minimum(weight)))
        derivative = (losses[0] - losses[1]) / (2 * step) * n
        assert derivative == pytest.approx(-float(values[place]), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_without_the_most_harmful_the_target_s_loss_is_lower(k: int, ridge: Ridge) -> None:
    values, _, w = scored(ridge)
    weight = torch.ones(len(values), dtype=torch.float64)
    weight[values.argsort()[:k]] = 0
    assert float(values.sort().values[k - 1]) < 0
    assert ridge.target_loss(ridge.minimum(weight)) < ridge.target_loss(w)
