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
from scipy.sparse import csr_array
from scipy.sparse.linalg import eigsh

from allmend.federation.collaboration.graph import identity, laplacian

Method: TypeAlias = Literal["implicit", "explicit"]

Step: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""What a pull makes of some coordinates [n, k]."""

BLOCK = 2**24
"""Numbers of all members that are worked on at a time, so that memory does not grow with the model."""

WIDTH = 128
"""Coordinates that are worked on at a time where the graph is sparse: of so many, a member's row stays in cache."""

ACCURACY = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Relative residual at which conjugate gradients stop, by the precision that they are in."""

STEPS = 500
"""Of conjugate gradients at most."""


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
    # a sparse graph means many members: there single precision halves what has to pass through memory
    precision = torch.float32 if w.is_sparse and adapters.dtype != torch.float64 else torch.float64
    found = torch.empty_like(adapters)
    step = (_explicit if method == "explicit" else _implicit)(w.to(precision), strength)
    width = WIDTH if w.is_sparse else max(1, BLOCK // len(adapters))
    for start in range(0, adapters.shape[1], width):
        some = slice(start, start + width)
        found[:, some] = step(adapters[:, some].to(precision)).to(adapters.dtype)
    return found


def pull_weights(w: torch.Tensor, strength: float) -> torch.Tensor:
    """(I + cL)⁻¹ [n, n], of a strided graph: what each member's model is made of after an implicit pull.

    Rows sum to 1, and so do columns; no entry is negative.
    """
    wide = w.double()
    matrix = identity(wide) + strength * laplacian(wide)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def largest_strength(w: torch.Tensor) -> float:
    """2 / λ_max(L): an explicit pull beyond it expands differences."""
    if not bool((w.coalesce().values() if w.is_sparse else w).any()):
        return float("inf")
    matrix = laplacian(w.double())
    if not w.is_sparse:
        return 2 / float(torch.linalg.eigvalsh(matrix)[-1])
    entries = matrix.coalesce()
    wide = csr_array((entries.values().numpy(), entries.indices().numpy()), shape=tuple(w.shape))
    start = torch.randn(len(w), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    (top,) = eigsh(wide, k=1, which="LA", v0=start, return_eigenvectors=False)
    return 2 / float(top)


def _explicit(w: torch.Tensor, strength: float) -> Step:
    moved = _compressed(identity(w) - strength * laplacian(w))
    return lambda x: moved @ x


def _implicit(w: torch.Tensor, strength: float) -> Step:
    if w.is_sparse:
        system = _compressed(identity(w) + strength * laplacian(w))
        return lambda x: _conjugate_gradients(system, x)
    weights = pull_weights(w, strength)
    return lambda x: weights @ x


def _compressed(matrix: torch.Tensor) -> torch.Tensor:
    """Rows of a sparse matrix as such: products with entries in no order take many times as long."""
    if not matrix.is_sparse:
        return matrix
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return matrix.coalesce().to_sparse_csr()


def _conjugate_gradients(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(I + cL)⁻¹ of each column, from the column itself: it leaves the mean as it is in every step."""
    tiny = torch.finfo(right.dtype).tiny
    x = right.clone()
    residual = right - system @ x
    direction = residual.clone()
    size = residual.square().sum(0)
    wanted = ACCURACY[right.dtype] ** 2 * right.square().sum(0)
    for _ in range(STEPS):
        if bool((size <= wanted).all()):
            break
        curved = system @ direction
        length = size / (direction * curved).sum(0).clamp_min(tiny)
        x.addcmul_(length, direction)
        residual.addcmul_(length, curved, value=-1)
        before, size = size, residual.square().sum(0)
        direction.mul_(size / before.clamp_min(tiny)).add_(residual)
    return x
