"""How well a block is conditioned and solved, and what of that makes scores uncertain."""

from collections.abc import Mapping, Sequence
from math import isfinite

import torch

from allmend.influence.blocks import FisherBlocks
from allmend.results import Table

FEW_RECORDS = 32
"""Below as many, the curvature that they show is mostly that of the few."""

LARGEST_CONDITION = 1e5
"""Of a block with its damping: beyond it, single precision leaves few digits of a solution."""

LARGEST_RESIDUAL = 1e-2
"""Of a solve, relatively."""

MOST_NEGATIVE = 1e-6
"""Of a block's trace: an eigenvalue further below 0 is more than rounding."""


class BlockFigures(Table):
    """One module's block M, and its solve (M + λI) V = v.

    Attributes:
        size: d of a block d × d.
        rows: of gradients whose products were summed; below 2 d, M is known along few directions.
        damping: λ.
        smallest: eigenvalue of M, over its trace; below 0 by no more than rounding.
        condition: of M + λI; None where it is not positive.
        residual: ‖v − (M + λI) V‖ / ‖v‖, in double precision.
        fit: share of the squared Frobenius norm of the block of all rd parameters that I ⊗ M holds, r‖M‖² / ‖F‖²; None
            where ‖F‖ is not known.
        dtype: in which it was solved.
    """

    size: int
    rows: int
    damping: float
    smallest: float
    condition: float | None
    residual: float
    fit: float | None
    dtype: str


def block_figures(
    blocks: FisherBlocks,
    module: str,
    *,
    damping: float,
    target: torch.Tensor,
    direction: torch.Tensor,
    squared_norm: float | None,
    dtype: torch.dtype,
) -> BlockFigures:
    """The figures of a module.

    Args:
        blocks: with M.
        module: which.
        damping: λ.
        target: v [q, r, d].
        direction: V [q, r, d].
        squared_norm: ‖F‖² of the block of all rd parameters, where it is known.
        dtype: in which it was solved.
    """
    matrix = _double(blocks.matrix(module))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    v, x = (_double(one if blocks.side == "wide" else one.mT) for one in (target, direction))
    left = v - x @ matrix - damping * x
    size = len(matrix)
    return BlockFigures(
        size=size,
        rows=blocks.count[module],
        damping=damping,
        smallest=low / float(eigenvalues.sum()),
        condition=(high + damping) / (low + damping) if low + damping > 0 else None,
        residual=float(torch.linalg.vector_norm(left)) / (float(torch.linalg.vector_norm(v)) or 1.0),
        fit=_fit(matrix, target[0].numel() // size, squared_norm),
        dtype=str(dtype).removeprefix("torch."),
    )


def _fit(matrix: torch.Tensor, copies: int, squared_norm: float | None) -> float | None:
    """‖I ⊗ M‖² / ‖F‖², with an identity of so many rows; at most 1, which an estimate of ‖F‖² may exceed."""
    if not squared_norm or not isfinite(squared_norm):
        return None
    return min(1.0, copies * float(matrix.square().sum()) / squared_norm)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU where a device has no numbers of double precision."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def cautions(figures: Mapping[str, BlockFigures], records: int) -> tuple[str, ...]:
    """Why scores are to be taken with care, in sentences; none where nothing is off.

    Args:
        figures: by module; none of a method without blocks.
        records: whose curvature it is.
    """
    found = []
    if records < FEW_RECORDS:
        found.append(f"Curvature comes from {records} records, fewer than {FEW_RECORDS}.")
    if few := [name for name, one in figures.items() if one.rows < 2 * one.size]:
        first = figures[few[0]]
        found.append(
            f"{_share(few, figures)} known along few directions: {few[0]} sums {first.rows:,} rows of gradients, fewer "
            f"than twice its size of {first.size:,}."
        )
    if indefinite := [name for name, one in figures.items() if one.smallest < -MOST_NEGATIVE]:
        worst = min(indefinite, key=lambda name: figures[name].smallest)
        found.append(
            f"{_share(indefinite, figures)} no sum of squares: {worst} has an eigenvalue of "
            f"{figures[worst].smallest:.2g} of its trace."
        )
    conditions = {name: one.condition or float("inf") for name, one in figures.items()}
    if steep := [name for name, value in conditions.items() if value > LARGEST_CONDITION]:
        worst = max(steep, key=conditions.__getitem__)
        found.append(
            f"{_share(steep, figures)} badly conditioned: {worst} with its damping has a condition number of "
            f"{conditions[worst]:.2g}, above {LARGEST_CONDITION:.0e}."
        )
    if loose := [name for name, one in figures.items() if one.residual > LARGEST_RESIDUAL]:
        worst = max(loose, key=lambda name: figures[name].residual)
        found.append(
            f"{_share(loose, figures)} solved badly: the residual of {worst} is {figures[worst].residual:.2g} of the "
            "target's gradient."
        )
    return tuple(found)


def _share(some: Sequence[str], figures: Mapping[str, BlockFigures]) -> str:
    return f"{len(some)} of {len(figures)} blocks {'is' if len(some) == 1 else 'are'}"
