"""Closed forms against sums of weights written out, and against simulated walks."""

import math

import numpy as np
import pytest
import torch

from allmend.optim.closed_forms import (
    adamw_angle,
    alignment,
    compensation,
    direction_scale,
    first_step_spike,
    inflation,
    lion_angle,
    lion_norm,
    noise_share,
    sgdm_angle,
    sign_persistence,
)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_the_share_of_noise_is_the_sum_of_squared_weights(beta: float, step: int) -> None:
    weights = [(1 - beta) * beta**age / (1 - beta**step) for age in range(step)]
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    assert noise_share(beta, step) == pytest.approx(sum(w * w for w in weights), rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.98])
def test_scales_are_limits_of_sums_of_squared_weights(beta: float) -> None:
    ages = range(5000)
    plain = [(1 - beta) * beta**age for age in ages]
    # the newest gradient enters once more
    nesterov = [beta * w + (1 - beta if age == 0 else 0.0) for age, w in enumerate(plain)]
    assert direction_scale(beta) == pytest.approx(math.sqrt(sum(w * w for w in plain)), rel=1e-9)
    assert direction_scale(beta, nesterov=True) == pytest.approx(math.sqrt(sum(w * w for w in nesterov)), rel=1e-9)


def test_the_first_steps_of_adam_are_longer_by_the_closed_form() -> None:
    """Adam's own update on noise, over many parameters, against steps late in the run."""
    noise = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(200_000))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.9999))
    lengths = []
    for _ in range(60):
        parameter.grad = torch.randn(parameter.shape, generator=noise)
        before = parameter.detach().clone()
        adam.step()
        lengths.append((parameter.detach() - before).norm().item())
    late = sum(lengths[40:]) / 20
    # the second moment is still an average of few gradients in the first steps, which lengthens none of them by much
    assert lengths[4] / late == pytest.approx(math.sqrt(noise_share(0.9, 5) / noise_share(0.9)), rel=0.12)
    assert inflation(0.9, 1) == pytest.approx(first_step_spike(0.9)) == pytest.approx(math.sqrt(1.9 / 0.1))
    shares = [math.sqrt(noise_share(0.9, step) / noise_share(0.9)) for step in range(1, 6)]
    assert inflation(0.9, 5) == pytest.approx(sum(shares) / 5)
    assert inflation(0.9, 5) > inflation(0.9, 50) > 1
    assert inflation(0.0, 7) == pytest.approx(1)


def walk(
    rule: str, *, lr: float, decay: float, beta1: float, beta2: float, elements: int = 2000
) -> tuple[float, float]:
    """Mean angle of a step and norm of a row in a long walk with gradients that are noise."""
    noise = np.random.default_rng(0)
    w = noise.normal(size=elements)
    m, v = np.zeros(elements), np.ones(elements)
    angles, norms = [], []
    steps = int(8 / (lr * decay))
    for step in range(steps):
        g = noise.normal(size=elements)
        if rule == "lion":
            direction = np.sign(beta1 * m + (1 - beta1) * g)
            m = beta2 * m + (1 - beta2) * g
        elif rule == "sgdm":
            m = beta1 * m + g + decay * w
            direction = m
        else:
            m = beta1 * m + (1 - beta1) * g
            direction = m / np.sqrt(v)  # v has reached the gradients' variance
        keep = 1 if rule == "sgdm" else 1 - lr * decay
        before, w = w, keep * w - lr * direction
        if step > steps // 2:
            cosine = before @ w / (np.linalg.norm(before) * np.linalg.norm(w))
            angles.append(math.acos(min(1.0, cosine)))
            norms.append(np.linalg.norm(w))
    return float(np.sqrt(np.mean(np.square(angles)))), float(np.mean(norms))


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.9), (0.9, 0.99), (0.81, 0.9)])
def test_a_walk_of_signs_has_the_angle_and_norm_of_the_arcsine_law(beta1: float, beta2: float) -> None:
    angle, norm = walk("lion", lr=1e-3, decay=0.5, beta1=beta1, beta2=beta2)
    assert lion_angle(1e-3, 0.5, beta1, beta2) == pytest.approx(angle, rel=0.03)
    assert lion_norm(1e-3, 0.5, beta1, beta2, elements=2000) == pytest.approx(norm, rel=0.03)


def test_walks_of_adamw_and_sgd_have_their_angles() -> None:
    angle, _ = walk("adamw", lr=1e-3, decay=0.5, beta1=0.9, beta2=0.0)
    assert adamw_angle(1e-3, 0.5, 0.9) == pytest.approx(angle, rel=0.03)
    angle, _ = walk("sgdm", lr=1e-3, decay=0.5, beta1=0.9, beta2=0.0)
    assert sgdm_angle(1e-3, 0.5, 0.9) == pytest.approx(angle, rel=0.03)


def test_independent_signs_are_a_walk_of_independent_steps() -> None:
    assert sign_persistence(0.0, 0.0) == pytest.approx(1)


def test_compensation_undoes_alignment() -> None:
    for per_example in (0.0, 1e-3, 0.8, 50.0):
        for batch in (1, 8, 512):
            product = alignment(per_example, batch) * compensation(per_example * batch, batch)
            assert product == pytest.approx(1 / math.sqrt(batch), rel=1e-12)


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5])
def test_what_is_no_momentum_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="lies in"):
        noise_share(beta)
    with pytest.raises(ValueError, match="count from 1"):
        noise_share(0.9, 0)
    with pytest.raises(ValueError, match="at least one step"):
        inflation(0.9, 0)
