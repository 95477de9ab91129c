"""The pull: every member's model moves towards those of the members that it works with.

A step on (ρ/2) Σ w_ij |x_i − x_j|² is X ← X − cLX, with L the graph's Laplacian and c the step times ρ. It leaves the
mean of all models where it is, and expands what it should contract once c λ_max(L) > 2: for members that all work with
each other beyond c = 2/n, so that a ρ for eight members is none for eighty. The implicit step (I + cL) X⁺ = X is stable
for every c, and has the same fixed points.
"""

import warnings
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch

from allmend.federation.collaboration.graph import laplacian

Method: TypeAlias = Literal["implicit", "explicit"]

Step: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""What a pull makes of some coordinates [n, k]."""

BLOCK = 2**24
"""Numbers of all members that are worked on at a time, so that memory does not grow with the model."""

ACCURACY = 1e-7
"""Relative residual at which conjugate gradients stop."""

STEPS = 500


def pull(adapters: torch.Tensor, w: torch.Tensor, strength: float, *, method: Method = "implicit") -> torch.Tensor:
    """X after a step towards the graph's neighbours.

    Args:
        adapters: X [n, d], a row for each member.
        w: [n, n], symmetric with a zero diagonal, not negative; strided, or sparse (COO).
        strength: c, not negative.
        method: `implicit`, (I + cL)⁻¹ X, or `explicit`, X − cLX.

    Returns:
        [n, d], in the precision of `adapters`.

    Raises:
        ValueError: the explicit step would expand differences; the largest strength that does not is named.
    """
    if strength == 0 or len(adapters) < 2:
        return adapters.clone()
    if method == "explicit" and strength > (most := largest_strength(w)):
        raise ValueError(f"a pull of {strength:.3g} would grow without end on this graph: {most:.3g} is the most")
    found = torch.empty_like(adapters)
    step = _explicit(w, strength) if method == "explicit" else _implicit(w, strength)
    width = max(1, BLOCK // len(adapters))
    for start in range(0, adapters.shape[1], width):
        some = slice(start, start + width)
        found[:, some] = step(adapters[:, some].double()).to(adapters.dtype)
    return found


def pull_weights(w: torch.Tensor, strength: float) -> torch.Tensor:
    """(I + cL)⁻¹ [n, n], of a strided graph: what each member's model is made of after an implicit pull.

    Rows sum to 1, and so do columns; no entry is negative.
    """
    matrix = torch.eye(len(w), dtype=torch.float64) + strength * laplacian(w.double())
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def largest_strength(w: torch.Tensor) -> float:
    """2 / λ_max(L): an explicit pull beyond it expands differences."""
    if w.is_sparse:
        times = _times_laplacian(w)
        x = torch.randn(len(w), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for _ in range(STEPS):
            x = times(x / x.norm().clamp_min(1e-300))
        top = float(x.norm())
    else:
        top = float(torch.linalg.eigvalsh(laplacian(w.double()))[-1]) if len(w) else 0.0
    return 2 / top if top > 0 else float("inf")


def _explicit(w: torch.Tensor, strength: float) -> Step:
    times = _times_laplacian(w)
    return lambda x: x - strength * times(x)


def _implicit(w: torch.Tensor, strength: float) -> Step:
    if w.is_sparse:
        times = _times_laplacian(w)
        return lambda x: _conjugate_gradients(times, strength, x)
    weights = pull_weights(w, strength)
    return lambda x: weights @ x


def _times_laplacian(w: torch.Tensor) -> Step:
    """L x. Rows of a sparse graph are compressed once: products with entries in no order take many times as long."""
    wide = w.double()
    degrees = wide.sum(1)
    if not w.is_sparse:
        return lambda x: degrees[:, None] * x - wide @ x
    degrees = degrees.to_dense()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        rows = wide.coalesce().to_sparse_csr()
    return lambda x: degrees[:, None] * x - rows @ x


def _conjugate_gradients(times: Step, strength: float, right: torch.Tensor) -> torch.Tensor:
    """(I + cL)⁻¹ of each column, from the column itself: it leaves the mean as it is in every step."""
    x = right.clone()
    residual = -strength * times(x)
    direction = residual.clone()
    size = residual.square().sum(0)
    wanted = ACCURACY**2 * right.square().sum(0)
    for _ in range(STEPS):
        if bool((size <= wanted).all()):
            break
        curved = direction + strength * times(direction)
        length = size / (direction * curved).sum(0).clamp_min(1e-300)
        x += length * direction
        residual -= length * curved
        before, size = size, residual.square().sum(0)
        direction = residual + size / before.clamp_min(1e-300) * direction
    return x
