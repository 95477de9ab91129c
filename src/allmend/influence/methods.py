"""Methods of influence: each turns target gradients into directions V, and a record's score is Σ ⟨V, g⟩ over modules.

With M the curvature of a module and λ its damping, V = v (M + λI)⁻¹ for a target's mean gradient v. Damping is relative
to the mean eigenvalue, so that the scale of the loss changes no order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import torch

from allmend.influence.blocks import FisherBlocks, Side, fisher_blocks
from allmend.influence.conditioning import LARGEST_CONDITION, BlockFigures, block_figures
from allmend.influence.fisher_norm import NormsOnTheWay
from allmend.influence.gradients import Source
from allmend.influence.inverses import Inverse, NotInvertedError, cholesky

Directions: TypeAlias = Mapping[str, torch.Tensor]
"""By module, [q, r, d]: one matrix for each of q targets."""

DAMPING = 0.1

SAFETY = 1.1
"""What power iteration may have missed of the largest eigenvalue, as a factor."""

HELD_BYTES = 2**30
"""Of gradients that `exact` holds at a time."""


@dataclass(frozen=True)
class Solved:
    """Directions, and how they were come by.

    Attributes:
        directions: by module.
        damping: λ by module.
        skipped: modules without a gradient anywhere, which count for nothing.
        notes: what a reader should know, in sentences.
        figures: of each block and its solve, where there are blocks.
    """

    directions: Directions
    damping: Mapping[str, float]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    figures: Mapping[str, BlockFigures] = field(default_factory=dict)


class Method(Protocol):
    """A way from training records and target gradients to directions."""

    @property
    def name(self) -> str: ...

    def solve(self, train: Source, targets: Directions) -> Solved:
        """Directions of targets [q, r, d] by module."""
        ...


@dataclass(frozen=True)
class HessianFree:
    """V = v: no curvature. With gradients of several checkpoints, TracIn (Pruthi et al., NeurIPS 2020)."""

    name: str = "hessian_free"

    def solve(self, train: Source, targets: Directions) -> Solved:
        return Solved(dict(targets), dict.fromkeys(targets, 0.0))


@dataclass(frozen=True)
class Curvature:
    """Blocks, and ‖F‖² of the block of all rd parameters of each module where it is known."""

    blocks: FisherBlocks
    squared_norms: Mapping[str, float | None]


@dataclass(frozen=True)
class Gfim:
    """The generalised Fisher information of HyperINF, with a solver of one's choice.

    M = Σ gᵀg / (n r), d × d (`wide`, the paper's), or Σ g gᵀ / (n d), r × r (`rank`, ours). It is the nearest matrix of
    the form I ⊗ M to the block of all rd parameters, and that block itself for r = 1.

    Attributes:
        damping: c of λ = c tr M / d.
        side: of the gradients.
        inverse: how M + λI is inverted.
    """

    damping: float = DAMPING
    side: Side = "wide"
    inverse: Inverse = cholesky
    name: str = "gfim"

    def solve(self, train: Source, targets: Directions) -> Solved:
        return self.solve_with(self.curvature(train), targets)

    def curvature(self, train: Source) -> "Curvature":
        """All that is needed of the training records, in one pass."""
        watched = NormsOnTheWay(train)
        blocks = fisher_blocks(watched, side=self.side)
        return Curvature(blocks, {name: watched.squared_norm(name) for name in blocks.sums})

    def solve_with(self, curvature: "Curvature", targets: Directions) -> Solved:
        """Directions, and the figures of blocks."""
        blocks = curvature.blocks
        solved = solve(blocks, targets, damping=self.damping, inverse=self.inverse)
        figures = {
            name: block_figures(
                blocks,
                name,
                damping=solved.damping[name],
                target=targets[name],
                direction=direction,
                squared_norm=curvature.squared_norms[name],
                dtype=_precision(blocks, name, targets[name], self.damping),
            )
            for name, direction in solved.directions.items()
        }
        return replace(solved, figures=figures)


def solve(
    blocks: FisherBlocks, targets: Directions, *, damping: float = DAMPING, inverse: Inverse = cholesky
) -> Solved:
    """V = v (M + λI)⁻¹, or (M + λI)⁻¹ v on the rank side.

    Where another inverse than Cholesky's gives up, Cholesky's is taken and a note says so. It is done in single
    precision, or in double where the damping is too small to keep the condition number within that.

    Args:
        blocks: curvature.
        targets: v [q, r, d] by module.
        damping: c of λ = c tr M / d.
        inverse: how.

    Raises:
        NotInvertedError: a block is not positive definite; its module and its smallest eigenvalue are named.
        ValueError: the damping is negative, or a module has no block.
    """
    if not damping >= 0:
        raise ValueError(f"damping must be 0 or more, got {damping}")
    if missing := targets.keys() - blocks.sums.keys():
        raise ValueError(f"there is no block for {min(missing)}")
    found: dict[str, torch.Tensor] = {}
    lambdas: dict[str, float] = {}
    notes: list[str] = []
    silent = set(blocks.silent)
    for name, v in targets.items():
        if name in silent:
            continue
        matrix = blocks.matrix(name).to(_precision(blocks, name, v, damping))
        lambdas[name] = damping * blocks.mean_eigenvalue(name)
        matrix = matrix + lambdas[name] * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        # rows of v are right sides: v M⁻¹ = (M⁻¹ vᵀ)ᵀ
        right = (v.mT if blocks.side == "wide" else v).to(matrix.dtype)
        wide = right.transpose(0, 1).flatten(1)[None]  # [1, side, q * other]
        try:
            solved = inverse(matrix[None], wide)
        except NotInvertedError as error:
            if inverse is cholesky:
                raise NotInvertedError(f"{name}: {error.what}", hint=error.hint) from None
            notes.append(f"{name}: {error.what}; Cholesky's factors were taken")
            solved = cholesky(matrix[None], wide)
        back = solved[0].reshape(len(matrix), len(v), -1).transpose(0, 1)
        found[name] = back.mT if blocks.side == "wide" else back
    return Solved(found, lambdas, tuple(sorted(silent & targets.keys())), tuple(notes))


def _precision(blocks: FisherBlocks, name: str, target: torch.Tensor, damping: float) -> torch.dtype:
    """Double where the condition number may be too large for single: it is tr(M + λI) / λ = d (1 + c) / c at most."""
    size = len(blocks.sums[name])
    if size * (1 + damping) > LARGEST_CONDITION * damping and target.device.type != "mps":  # which has no double
        return torch.float64
    return torch.promote_types(target.dtype, torch.float32)


@dataclass(frozen=True)
class DataInf:
    """The mean over records of (g gᵀ + λI)⁻¹ in place of the inverse of the mean (Kwon et al., ICLR 2024).

    V = (v − (1/n) Σ_i g_i ⟨g_i, v⟩ / (λ + ‖g_i‖²)) / λ. Exact for one record, and where all gradients are equal.

    Attributes:
        damping: c of λ = c tr F / (rd).
    """

    damping: float = DAMPING
    name: str = "datainf"

    def solve(self, train: Source, targets: Directions) -> Solved:
        lambdas = relative_damping(train, self.damping)
        sums = corrections(train, targets, lambdas)
        found = {name: (v - sums[name] / len(train)) / lambdas[name] for name, v in targets.items() if lambdas[name]}
        return Solved(found, lambdas, tuple(sorted(targets.keys() - found.keys())))


def corrections(source: Source, targets: Directions, lambdas: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Σ_i g_i ⟨g_i, v⟩ / (λ + ‖g_i‖²) for each target v, by module [q, r, d]; zeros where λ is 0."""
    sums = {name: torch.zeros_like(v) for name, v in targets.items()}
    for batch in source:
        for name, v in targets.items():
            if not lambdas[name]:
                continue
            g = batch.gradients[name].flatten(1)  # [n, rd]
            weight = (g @ v.flatten(1).to(g).T) / (lambdas[name] + g.square().sum(1, keepdim=True))  # [n, q]
            sums[name] += (weight.T @ g).view_as(v).to(v)
    return sums


@dataclass(frozen=True)
class Lissa:
    """x ← v + (I − α(F + λI)) x, repeated (Agarwal et al., JMLR 2017); x α tends to (F + λI)⁻¹ v.

    It converges if α times the largest eigenvalue is below 2; α is the inverse of that eigenvalue, found by power
    iteration, unless it is given. One that does not converge gives no scores.

    Attributes:
        damping: c of λ = c tr F / (rd).
        steps: of the recursion; each is a pass over the records.
        alpha: α.
    """

    damping: float = DAMPING
    steps: int = 10
    alpha: float | None = None
    name: str = "lissa"

    def solve(self, train: Source, targets: Directions) -> Solved:
        lambdas = relative_damping(train, self.damping)
        alive = {name: v for name, v in targets.items() if lambdas[name]}
        largest = _largest_eigenvalues(train, alive)
        alphas = {name: self.alpha or 1 / (largest[name] + lambdas[name]) for name in alive}
        x = {name: v.clone() for name, v in alive.items()}
        for name, alpha in alphas.items():
            # the eigenvalue was found from below and then raised
            if alpha * (least := largest[name] / SAFETY + lambdas[name]) > 2:
                raise NotInvertedError(
                    f"{name}: the recursion diverges, since α λ_max = {alpha * least:.3g} is above 2",
                    hint=f"Use an α of {1 / least:.3g} or less.",
                )
        residual = {name: float("inf") for name in alive}
        for _ in range(self.steps):
            product = times_fisher(train, x)
            for name, v in alive.items():
                curved = product[name] + lambdas[name] * x[name]
                left = v - curved * alphas[name]
                now = float(torch.linalg.vector_norm(left)) / max(float(torch.linalg.vector_norm(v)), 1e-300)
                if not now < 1e6 or now > 1.01 * residual[name] > 1e-6:
                    raise NotInvertedError(
                        f"{name}: the recursion diverges with α = {alphas[name]:.3g}", hint="Lower it, or leave it out."
                    )
                residual[name] = now
                x[name] = x[name] + left
        found = {name: alphas[name] * one for name, one in x.items()}
        worst = max(residual.values(), default=0.0)
        note = f"after {self.steps} steps the residual is {worst:.2g} of the target's gradient"
        return Solved(found, lambdas, tuple(sorted(targets.keys() - found.keys())), (note,))


@dataclass(frozen=True)
class Exact:
    """(F + λI)⁻¹ v with the block of all rd parameters, F = mean of g gᵀ, through the n × n products of gradients.

    v / λ − Gᵀ (G Gᵀ + nλI)⁻¹ G v / λ. It holds all gradients of some modules in memory, as many modules at a time as
    `HELD_BYTES` has room for, and takes n² r d multiplications for each: for a few thousand records in one place.

    Attributes:
        damping: c of λ = c tr F / (rd).
        name: of the method.
    """

    damping: float = DAMPING
    name: str = "exact"

    def solve(self, train: Source, targets: Directions) -> Solved:
        lambdas = relative_damping(train, self.damping)
        found: dict[str, torch.Tensor] = {}
        n = len(train)
        for name, gradients in in_turn(train, [name for name in targets if lambdas[name]]):
            v, g = targets[name], gradients.flatten(1)
            wide = torch.promote_types(g.dtype, torch.float32)
            g, right = g.to(wide), v.flatten(1).to(wide)
            products = g @ g.T
            products.diagonal().add_(n * lambdas[name])
            inner = torch.linalg.solve(products, g @ right.T)  # [n, q]
            found[name] = ((right - inner.T @ g) / lambdas[name]).view_as(v)
        return Solved(found, lambdas, tuple(sorted(targets.keys() - found.keys())))


def in_turn(source: Source, modules: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each module with all its gradients in the records' order [n, r, d], in as few passes as `HELD_BYTES` allows."""
    left = list(modules)
    while left:
        held: dict[str, torch.Tensor] = {}
        room = HELD_BYTES
        for batch in source:
            places = torch.tensor(batch.places)
            if not held:
                for name in left:
                    g = batch.gradients[name]
                    room -= len(source) * g[0].numel() * g.element_size()
                    if held and room < 0:
                        break
                    held[name] = g.new_zeros(len(source), *g.shape[1:])
            for name, whole in held.items():
                whole[places.to(whole.device)] = batch.gradients[name]
        if not held:
            raise ValueError("there are no records")
        for name in list(held):
            left.remove(name)
            yield name, held.pop(name)


def relative_damping(source: Source, damping: float) -> dict[str, float]:
    """λ by module: c times the mean eigenvalue of F, which is the mean square of a gradient's entries.

    Raises:
        ValueError: the damping is not above 0.
    """
    if not damping > 0:
        raise ValueError(f"damping must be above 0 here, got {damping}")
    squares: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for batch in source:
        for name, g in batch.gradients.items():
            squares[name] = squares.get(name, 0.0) + float(g.double().square().sum())
            sizes[name] = g[0].numel()
    return {name: damping * total / sizes[name] / len(source) for name, total in squares.items()}


def times_fisher(source: Source, directions: Directions) -> dict[str, torch.Tensor]:
    """F x of each module, F = mean of g gᵀ over records, in one pass."""
    sums = {name: torch.zeros_like(x) for name, x in directions.items()}
    for batch in source:
        for name, x in directions.items():
            g = batch.gradients[name].flatten(1)
            sums[name] += ((g @ x.flatten(1).T).T @ g).view_as(x)
    return {name: total / len(source) for name, total in sums.items()}


def _largest_eigenvalues(source: Source, like: Directions, steps: int = 8) -> dict[str, float]:
    """Of F by module, from below, by power iteration, times `SAFETY`."""
    generator = torch.Generator().manual_seed(0)
    x = {
        name: torch.randn(1, *v.shape[1:], generator=generator, dtype=torch.float64).to(v)
        for name, v in sorted(like.items())  # so that the order in which modules come does not matter
    }
    found = dict.fromkeys(like, 0.0)
    for _ in range(steps):
        x = {name: one / torch.linalg.vector_norm(one).clamp_min(1e-30) for name, one in x.items()}
        product = times_fisher(source, x)
        found = {name: float(torch.linalg.vector_norm(one)) for name, one in product.items()}
        x = product
    return {name: SAFETY * value for name, value in found.items()}
