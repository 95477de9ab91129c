"""A small network's training against the formulas written out in NumPy, in double precision."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch

from allmend.optim import LionA, LionAR

STEPS, LR, DECAY, BETA = 50, 0.01, 0.1, 0.9


def data() -> tuple[Any, Any, Any, Any]:
    random = np.random.default_rng(0)
    return tuple(random.normal(size=shape) for shape in ((12, 5), (12, 3), (7, 5), (3, 7)))  # type: ignore[return-value]


def gradients(x: Any, y: Any, first: Any, second: Any) -> tuple[float, Any, Any]:
    """Loss and gradients of mean (W₂ tanh(W₁ x) − y)²."""
    hidden = np.tanh(x @ first.T)
    error = hidden @ second.T - y
    scale = 2 / error.size
    back = (scale * error @ second) * (1 - hidden**2)
    return float((error**2).mean()), back.T @ x, (scale * error).T @ hidden


def liona(w: Any, m: Any, g: Any, step: int, ramp: str) -> tuple[Any, Any]:
    m = BETA * m + (1 - BETA) * g
    c = 1 - BETA**step if ramp == "mean" else 1.0
    s = math.sqrt((1 - BETA) / (1 + BETA))
    return (1 - LR * DECAY) * w - LR * s * c * np.sign(m), m


def lionar(w: Any, m: Any, g: Any, state: dict[str, Any], step: int) -> tuple[Any, Any]:
    """Row by row, with the gain that takes the place of a norm."""
    m = BETA * m + (1 - BETA) * g
    s = math.sqrt((1 - BETA) / (1 + BETA))
    theta = math.sqrt(2 * LR * DECAY) * s
    new = np.empty_like(w)
    for i, row in enumerate(w):
        x = row / np.linalg.norm(row)
        d = np.sign(m[i]) - (np.sign(m[i]) @ x) * x
        d /= np.linalg.norm(d)
        state["radial"][i] = BETA * state["radial"][i] + (1 - BETA) * (g[i] @ x)
        state["gain"][i] = max(0.05, state["gain"][i] - LR * s * np.sign(state["radial"][i]))
        new[i] = state["norm"][i] * state["gain"][i] * (x * math.cos(theta) - d * math.sin(theta))
    return new, m


@pytest.mark.parametrize("kind", ["liona", "liona with a ramp", "lionar"])
def test_the_losses_are_those_of_the_formulas(kind: str) -> None:
    x, y, *start = data()
    first, second = start
    ramp: Literal["mean", "none"] = "mean" if "ramp" in kind else "none"
    weights = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in (first, second)]
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "beta": BETA, "momentum_ramp": ramp}
    optimizer = LionAR(weights, **options) if kind == "lionar" else LionA(weights, **options)
    momenta = [np.zeros_like(first), np.zeros_like(second)]
    states = [
        {"norm": np.linalg.norm(w, axis=1), "gain": np.ones(len(w)), "radial": np.zeros(len(w))}
        for w in (first, second)
    ]
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        hidden = torch.tanh(torch.from_numpy(x) @ weights[0].T)
        loss = (hidden @ weights[1].T - torch.from_numpy(y)).square().mean()
        loss.backward()
        optimizer.step()
        expected, *found = gradients(x, y, first, second)
        assert loss.item() == pytest.approx(expected, rel=1e-9), step
        both = []
        for place, w in enumerate((first, second)):
            if kind == "lionar":
                w, momenta[place] = lionar(w, momenta[place], found[place], states[place], step)
            else:
                w, momenta[place] = liona(w, momenta[place], found[place], step, ramp)
            both.append(w)
        first, second = both
