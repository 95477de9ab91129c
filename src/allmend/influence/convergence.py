"""How fast approximate inverses come to the exact one, on synthetic gradients.

As the simulation of Zhou, Fan, Jaggi, "HyperINF", arXiv 2410.05090, section 3: (F + λI)⁻¹ v for F the mean of s sᵀ over
samples s, by hyperpower iteration, by LiSSA's recursion and by DataInf's mean of inverses, against the exact solution.
Here the samples have a spectrum that falls like a power law, as gradients have.
"""

from itertools import islice

import torch

from allmend.influence.gradients import Given
from allmend.influence.inverses import approximations, mean_residual
from allmend.influence.methods import DAMPING, DataInf, Lissa
from allmend.results import Table

ORDERS = (2, 3, 4)

VECTORS = 8
"""Right sides."""

FINE = 1e-10
"""Residual at which the iteration of order 2 has arrived."""

MANY = (100, 1000)
"""More steps of LiSSA, of which one costs as much as a column of a matrix product."""


class Convergence(Table):
    """Errors are ‖x − A⁻¹v‖ / ‖A⁻¹v‖ over all right sides, A = F + λI; lists are by step, from 0.

    Attributes:
        size: d.
        samples: n.
        condition: of A.
        residual: by order of the iteration, ‖I − A X_k‖_F / √d.
        error: by order.
        lissa: after as many steps.
        lissa_later: after so many.
        datainf: which takes no steps.
        uncurved: of v divided by the mean eigenvalue of A: no inverse at all.
        seed: of samples and right sides.
    """

    size: int
    samples: int
    condition: float
    residual: dict[int, tuple[float, ...]]
    error: dict[int, tuple[float, ...]]
    lissa: tuple[float, ...]
    lissa_later: dict[int, float]
    datainf: float
    uncurved: float
    seed: int

    def arrival(self, order: int, error: float) -> int | None:
        """The first step with an error no larger; None if there is none."""
        return next((step for step, one in enumerate(self.error[order]) if one <= error), None)


def simulate(size: int, *, seed: int = 0, damping: float = DAMPING) -> Convergence:
    """Follow each approximation, in double precision on the CPU.

    Args:
        size: d; twice as many samples are drawn.
        seed: of samples and right sides.
        damping: c of λ = c tr F / d.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
    samples = torch.randn(2 * size, size, generator=generator, dtype=torch.float64) * spectrum.sqrt()
    v = torch.randn(VECTORS, size, generator=generator, dtype=torch.float64)
    f = samples.T @ samples / len(samples)
    a = f + damping * f.trace() / size * torch.eye(size, dtype=torch.float64)
    exact = torch.cholesky_solve(v.T, torch.linalg.cholesky(a)).T

    def error(x: torch.Tensor) -> float:
        return float(torch.linalg.vector_norm(x - exact) / torch.linalg.vector_norm(exact))

    residual: dict[int, list[float]] = {order: [] for order in ORDERS}
    errors: dict[int, list[float]] = {order: [] for order in ORDERS}
    for order in ORDERS:
        for x, r in islice(approximations(a[None], order=order), 64):
            residual[order].append(mean_residual(r))
            errors[order].append(error(v @ x[0]))
            if residual[order][-1] <= FINE:
                break
    # gradients of one row: the block of all parameters is d × d, and the methods' own code applies
    source, targets = Given({"": samples[:, None]}, batch=len(samples)), {"": v[:, None]}

    def lissa(steps: int) -> float:
        return error(Lissa(damping, steps).solve(source, targets).directions[""][:, 0])

    eigenvalues = torch.linalg.eigvalsh(a)
    return Convergence(
        size=size,
        samples=len(samples),
        condition=float(eigenvalues[-1] / eigenvalues[0]),
        residual={order: tuple(found) for order, found in residual.items()},
        error={order: tuple(found) for order, found in errors.items()},
        lissa=tuple(map(lissa, range(max(map(len, errors.values()))))),
        lissa_later={steps: lissa(steps) for steps in MANY},
        datainf=error(DataInf(damping).solve(source, targets).directions[""][:, 0]),
        uncurved=error(v / eigenvalues.mean()),
        seed=seed,
    )
