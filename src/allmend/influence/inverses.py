"""Ways to (A + λI)⁻¹ b for symmetric positive definite A: each is one function on a batch of matrices.

Cholesky's is the default: it is faster and more accurate at every size that was measured. Hyperpower iteration
(Schulz's at order 2; Zhou, Fan, Jaggi, "HyperINF", arXiv 2410.05090) needs matrix products only.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeAlias

import torch

from allmend.errors import UserError

Inverse: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of symmetric positive definite matrices [b, d, d] and right sides [b, d, k]: the solutions [b, d, k]."""


class NotInvertedError(UserError):
    """A matrix is not positive definite, or an iteration did not come to its inverse."""


def cholesky(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """By Cholesky's factors; no inverse is formed.

    Raises:
        NotInvertedError: a matrix is not positive definite; its smallest eigenvalue is told.
    """
    symmetric = _symmetric(matrices)
    factor, info = torch.linalg.cholesky_ex(symmetric)
    if bool(info.any()):
        raise _indefinite(torch.linalg.eigvalsh(symmetric[info > 0]))
    return torch.cholesky_solve(right, factor)


def eigen(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """By eigenvalues and eigenvectors.

    Raises:
        NotInvertedError: a matrix is not positive definite; its smallest eigenvalue is told.
    """
    values, vectors = torch.linalg.eigh(_symmetric(matrices))
    if not bool((values > 0).all()):
        raise _indefinite(values)
    found: torch.Tensor = vectors @ ((vectors.mT @ right) / values.unsqueeze(-1))
    return found


def _indefinite(values: torch.Tensor) -> NotInvertedError:
    least = float(values.min())
    return NotInvertedError(
        f"not positive definite: the smallest eigenvalue is {least:.3g}", hint="Raise the damping above that."
    )


@dataclass(frozen=True)
class Iterated:
    """What an iteration came to.

    Attributes:
        inverse: approximate inverses [b, d, d].
        residual: ‖I − A X‖_F / √d, the largest of the batch.
        steps: taken.
    """

    inverse: torch.Tensor
    residual: float
    steps: int


def iterate(
    matrices: torch.Tensor,
    *,
    order: int = 2,
    tol: float | None = None,
    max_steps: int = 60,
    start: torch.Tensor | None = None,
) -> Iterated:
    """X ← X (I + R + … + R^{p−1}) with R = I − A X, from X₀ = I / ‖A‖_∞, until R is small.

    For a symmetric positive definite A this start always converges. Stopped before that, eigenvalues below
    1 / (2^k x₀) are not inverted but all multiplied by about 2^k x₀: a hidden damping.

    Args:
        matrices: A [b, d, d].
        order: p; 2 is Schulz's.
        tol: of the residual; what rounding allows when None.
        max_steps: the most.
        start: X₀ instead, such as the inverse of a matrix nearby; where ‖I − A X₀‖ is 1 or more it is not taken.

    Raises:
        NotInvertedError: the residual came to no number, grew, or stayed above the tolerance.
        ValueError: the order is below 2.
    """
    d, dtype = matrices.shape[-1], matrices.dtype
    if start is not None and not _closer_than_nothing(matrices, start):
        start = None
    floor = 32 * torch.finfo(dtype).eps * math.sqrt(d)
    least = tol if tol is not None else max(1e-5 if dtype == torch.float32 else 1e-12, floor)
    residual, last = math.inf, math.inf
    for step, (x, r) in enumerate(islice(approximations(matrices, order=order, start=start), max_steps + 1)):
        residual = mean_residual(r)
        if not math.isfinite(residual) or (step > 4 and residual > 1):
            raise NotInvertedError(f"the iteration does not converge (residual {residual:.3g} after {step} steps)")
        if residual <= least or (residual < 0.1 and residual >= last):
            return Iterated(x, residual, step)
        last = residual
    raise NotInvertedError(f"the iteration has not converged after {max_steps} steps (residual {residual:.3g})")


def approximations(
    matrices: torch.Tensor, *, order: int = 2, start: torch.Tensor | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """X_k and R_k = I − A X_k [b, d, d] for k = 0, 1, …, without end and whatever becomes of them.

    Args:
        matrices: A [b, d, d].
        order: p.
        start: X₀; I / ‖A‖_∞ when None.

    Raises:
        ValueError: the order is below 2.
    """
    if order < 2:
        raise ValueError(f"hyperpower iteration has an order of 2 or more, got {order}")
    a = _symmetric(matrices)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    x = start if start is not None else eye / torch.linalg.matrix_norm(a, ord=math.inf).view(*a.shape[:-2], 1, 1)
    while True:
        r = eye - a @ x
        yield x, r
        power, total = r, eye + r
        for _ in range(order - 2):
            power = power @ r
            total = total + power
        x = x @ total


def mean_residual(residuals: torch.Tensor) -> float:
    """‖R‖_F / √d, the largest of a batch [b, d, d]: 1 for X = 0."""
    return float(torch.linalg.matrix_norm(residuals).max()) / math.sqrt(residuals.shape[-1])


def _closer_than_nothing(matrices: torch.Tensor, start: torch.Tensor) -> bool:
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return float(torch.linalg.matrix_norm(eye - _symmetric(matrices) @ start).max()) < 1


def hyperpower(
    order: int = 2, *, tol: float | None = None, max_steps: int = 60, start: torch.Tensor | None = None
) -> Inverse:
    """`iterate`, then a product with the right sides."""
    return partial(_iterated, order=order, tol=tol, max_steps=max_steps, start=start)


def _iterated(
    matrices: torch.Tensor,
    right: torch.Tensor,
    *,
    order: int,
    tol: float | None,
    max_steps: int,
    start: torch.Tensor | None,
) -> torch.Tensor:
    found = iterate(matrices, order=order, tol=tol, max_steps=max_steps, start=start)
    return found.inverse @ right


def schulz_steps(largest_row_sum: float, smallest: float, tolerance: float) -> int:
    """Steps of order 2 to a residual: ⌈log₂(ln ε / ln(1 − x₀ λ_min))⌉ with x₀ = 1 / ‖A‖_∞."""
    return math.ceil(math.log2(math.log(tolerance) / math.log1p(-smallest / largest_row_sum)))


def spectral_filter(values: torch.Tensor, start: float, steps: int) -> torch.Tensor:
    """What `steps` of Schulz's iteration from x₀ I make of eigenvalues a: (1 − (1 − x₀ a)^(2^k)) / a."""
    return (1 - (1 - start * values) ** (2.0**steps)) / values


INVERSES: dict[str, Inverse] = {"cholesky": cholesky, "eigen": eigen, "hyperpower": hyperpower()}


def _symmetric(matrices: torch.Tensor) -> torch.Tensor:
    return (matrices + matrices.mT) / 2
