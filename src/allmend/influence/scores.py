"""Scores of records: how much each moved a model towards a target, by any method, in a pass of its own."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from allmend.influence.blocks import FisherBlocks, Side, fisher_blocks
from allmend.influence.gradients import Source, mean_gradient
from allmend.influence.inverses import Inverse, cholesky
from allmend.influence.methods import DAMPING, Directions, Method, Solved, solve


@dataclass(frozen=True)
class Scores:
    """Scores of n records for q targets.

    Attributes:
        method: by which.
        targets: names of the groups of target records, q of them.
        values: float64 [n, q]; above 0 where training on the record lowers the target's loss.
        losses: of the records, summed over their targets (nats), float64 [n].
        solved: the directions, their damping, and what was left out.
    """

    method: str
    targets: tuple[str, ...]
    values: torch.Tensor
    losses: torch.Tensor
    solved: Solved


def score(train: Source, directions: Directions) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ over modules of ⟨V, g⟩ for each record and target [n, q], and the records' losses [n], both float64."""
    q = len(next(iter(directions.values()))) if directions else 0
    values = torch.zeros(len(train), q, dtype=torch.float64)
    losses = torch.zeros(len(train), dtype=torch.float64)
    for batch in train:
        places = torch.tensor(batch.places)
        losses[places] = batch.losses
        for name, v in directions.items():
            g = batch.gradients[name].flatten(1)
            values[places] += (g @ v.flatten(1).to(g).T).double().cpu()
    return values, losses


def influence(
    train: Source, target: Source, method: Method, *, groups: Sequence[Collection[str]] | None = None
) -> Scores:
    """Scores of training records for target records.

    Args:
        train: the training records' gradients.
        target: the target records'.
        method: how curvature comes in.
        groups: the groups of each target record; all in one, called `all`, when None.

    Raises:
        ValueError: there are no records.
        UserError: the method cannot be applied; it says why.
    """
    if not len(train):
        raise ValueError("there is no training record")
    names, means = mean_gradient(target, groups)
    solved = method.solve(train, means)
    values, losses = score(train, solved.directions)
    return Scores(method.name, tuple(names), values, losses, solved)


def self_influence(
    train: Source,
    *,
    damping: float = DAMPING,
    side: Side = "wide",
    inverse: Inverse = cholesky,
    blocks: FisherBlocks | None = None,
) -> torch.Tensor:
    """⟨g (M + λI)⁻¹, g⟩ of each record, float64 [n]: how far a record moves its own loss. Large for odd ones.

    Args:
        train: the records' gradients.
        damping: c of λ = c tr M / d.
        side: of the gradients.
        inverse: how M + λI is inverted.
        blocks: curvature of other records, such as all members'; of these when None.
    """
    blocks = blocks or fisher_blocks(train, side=side)
    # every record is a right side of its own: one inverse for all costs less than factors anew for each batch
    eyes = {name: torch.eye(len(one), dtype=one.dtype, device=one.device)[None] for name, one in blocks.sums.items()}
    inverses = solve(blocks, eyes, damping=damping, inverse=inverse).directions
    found = torch.zeros(len(train), dtype=torch.float64)
    for batch in train:
        places = torch.tensor(batch.places)
        for name, inverted in inverses.items():
            g = batch.gradients[name].to(inverted.dtype).contiguous()  # bits are not to depend on how it lies
            moved = g @ inverted[0] if blocks.side == "wide" else inverted[0] @ g
            found[places] += (moved * g).flatten(1).sum(1).double().cpu()
    return found
