"""How long each inverse takes on a device, and which of them wins there."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from allmend.influence.inverses import Inverse, NotInvertedError, cholesky, eigen, hyperpower, iterate
from allmend.results import Table

SIZES = ((120, 8), (120, 64), (8, 192), (2, 576), (1, 1024), (1, 2048))
"""Batches of matrices and their size: the blocks of adapters on small models, on both sides, and larger ones."""

RIGHT_SIDES = 8

TOLERANCE = 1e-4
"""Residual at which the iteration stops."""

DAMPING = 0.1
"""λ over the mean eigenvalue."""

ROUNDS, FEW_ROUNDS = 5, 3
"""In which every inverse has a turn; few where a round takes long, and then the first counts too."""

LONG = 1.0
"""Seconds of a long round."""

ACCURATE = 1e-3
"""Error of solutions that will do."""


def _full_inverse(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.cholesky_inverse(torch.linalg.cholesky(matrices)) @ right
    return found


WAYS: dict[str, Inverse] = {
    "cholesky": cholesky,
    "full_inverse": _full_inverse,
    "eigen": eigen,
    "hyperpower": hyperpower(tol=TOLERANCE),
}
"""Cholesky's factors with the right sides solved; the inverse formed from them; eigenvectors; the iteration."""

CANDIDATES = ("cholesky", "eigen", "hyperpower")
"""Those that `--inverse` knows."""


class Timing(Table):
    """One batch of matrices.

    Attributes:
        batch, size: of matrices d × d.
        condition: of each, the largest.
        seconds: by way, of each round; none of one that gave up.
        error: by way, of the solutions, relatively.
        steps: of the iteration; None where it gave up.
    """

    batch: int
    size: int
    condition: float
    seconds: dict[str, tuple[float, ...]]
    error: dict[str, float]
    steps: int | None

    @property
    def winner(self) -> str:
        """The fastest candidate by its median that is accurate enough; Cholesky's where its rounds overlap."""
        fit = [name for name in CANDIDATES if self.seconds[name] and self.error[name] <= ACCURATE]
        best = min(fit, key=lambda name: statistics.median(self.seconds[name]), default="cholesky")
        apart = self.seconds["cholesky"] and max(self.seconds[best]) >= min(self.seconds["cholesky"])
        return "cholesky" if apart else best


def eigenvalues(size: int) -> torch.Tensor:
    """j⁻¹ for j = 1 … d, and a tenth of their mean as damping."""
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
    return values + DAMPING * values.mean()


def spectrum_matrices(batch: int, size: int, *, seed: int) -> torch.Tensor:
    """Matrices [b, d, d] in double precision with these eigenvalues and eigenvectors drawn by chance."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(batch, size, size, generator=generator, dtype=torch.float64))
    found: torch.Tensor = (q * eigenvalues(size)) @ q.mT
    return found


def time_inverses(
    sizes: Sequence[tuple[int, int]] = SIZES,
    *,
    device: torch.device,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Timing]:
    """Time every way at each size in single precision, one after the other in each round.

    Args:
        sizes: batch and d of each.
        device: where.
        seed: of matrices and right sides.
        clock: seconds.
    """
    for batch, size in sizes:
        exact_matrices = spectrum_matrices(batch, size, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        exact_right = torch.randn(batch, size, RIGHT_SIDES, generator=generator, dtype=torch.float64)
        exact = torch.linalg.solve(exact_matrices, exact_right)
        matrices, right = (one.float().to(device) for one in (exact_matrices, exact_right))
        rounds = [_round(matrices, right, exact, clock)]
        whole = sum(seconds for seconds, _ in rounds[0].values() if seconds is not None)
        rounds = rounds if whole > LONG else []
        while len(rounds) < (FEW_ROUNDS if whole > LONG else ROUNDS):
            rounds.append(_round(matrices, right, exact, clock))
        seconds = {name: tuple(one for found in rounds if (one := found[name][0]) is not None) for name in WAYS}
        error = {name: found for name in WAYS if (found := rounds[-1][name][1]) is not None}
        values = eigenvalues(size)
        yield Timing(
            batch=batch,
            size=size,
            condition=float(values[0] / values[-1]),
            seconds=seconds,
            error=error,
            steps=_steps(matrices),
        )


def _round(
    matrices: torch.Tensor, right: torch.Tensor, exact: torch.Tensor, clock: Callable[[], float]
) -> dict[str, tuple[float | None, float | None]]:
    """Seconds and error of each way; None of one that gave up."""
    found: dict[str, tuple[float | None, float | None]] = {}
    for name, way in WAYS.items():
        _finish(matrices.device)
        began = clock()
        try:
            solved = way(matrices, right)
        except NotInvertedError:
            found[name] = None, None
            continue
        _finish(matrices.device)
        seconds = clock() - began
        off = torch.linalg.vector_norm(solved.cpu().double() - exact) / torch.linalg.vector_norm(exact)
        found[name] = seconds, float(off)
    return found


def _finish(device: torch.device) -> None:
    """Wait for what a device still works on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _steps(matrices: torch.Tensor) -> int | None:
    try:
        return iterate(matrices, tol=TOLERANCE).steps
    except NotInvertedError:
        return None


def fastest_of(timings: Sequence[Timing]) -> str:
    """What `auto` is to take: a candidate that wins at every size, and otherwise Cholesky's."""
    winners = {one.winner for one in timings}
    return winners.pop() if len(winners) == 1 else "cholesky"


WORDS = {"cholesky": "Cholesky's factors", "eigen": "eigenvectors", "hyperpower": "the hyperpower iteration"}


def verdict(timings: Sequence[Timing], *, lasting: bool = True) -> str:
    """One sentence: which inverse wins, by how much, and what `auto` takes.

    Args:
        timings: at each size.
        lasting: whether `auto` goes by them from now on.
    """
    chosen = fastest_of(timings)
    won = {name: sum(one.winner == name for one in timings) for name in CANDIDATES}
    best = max(won, key=lambda name: won[name])
    count = f"at {won[best]} of {len(timings)} sizes" if len(timings) > 1 else "at this size"
    ratios = [
        statistics.median(one.seconds[name]) / statistics.median(one.seconds[best])
        for one in timings
        for name in CANDIDATES
        if name != best and one.winner == best and one.seconds[name] and one.seconds[best]
    ]
    by = f", {min(ratios):.2g} to {max(ratios):.2g} times as fast as the others" if ratios else ""
    what = WORDS[best]
    wins = f"{what[0].upper()}{what[1:]} win{'s' if best == 'hyperpower' else ''} {count}{by}"
    if not lasting:
        return f"{wins}; `--inverse auto` goes by the usual sizes, and does not change."
    return f"{wins}: `--inverse auto` takes {chosen} on this device."
