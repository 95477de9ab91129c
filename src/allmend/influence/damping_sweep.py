"""Scores under other dampings: whether what they say depends on a constant that nothing but habit has set."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from allmend.errors import UserError
from allmend.influence.gradients import Source, mean_gradient
from allmend.influence.methods import Directions, Gfim, Method, Solved
from allmend.influence.scores import Scores, score

SWEEP = (0.001, 0.01, 0.1, 1.0, 10.0)
"""c of λ = c times the mean eigenvalue."""

NO_TARGET = (
    "No validation target exists in general: this shows how much the order of records depends on the damping, not "
    "which damping is right."
)


def sweep(
    train: Source,
    target: Source,
    method: Method,
    dampings: Sequence[float] = SWEEP,
    *,
    groups: Sequence[Collection[str]] | None = None,
) -> dict[float, Scores]:
    """Scores under each damping; all of them come from one last pass over the training records.

    Args:
        train, target, groups: as of `influence`.
        method: one with a damping.
        dampings: c of each.

    Raises:
        UserError: the method has no damping.
        ValueError: there is no training record.
    """
    if not len(train):
        raise ValueError("there is no training record")
    if not hasattr(method, "damping"):
        raise UserError(f"{method.name} has no damping to vary", where="--damping-sweep", hint="Use --method gfim.")
    names, means = mean_gradient(target, groups)
    found = dict(zip(dampings, _solved(train, method, means, dampings), strict=True))
    joined = {
        name: torch.cat([one.directions[name] for one in found.values()]) for name in found[dampings[0]].directions
    }
    values, losses = score(train, joined)
    parts = torch.split(values, len(names), dim=1) if joined else [values] * len(found)
    return {
        damping: Scores(method.name, tuple(names), part, losses, solved)
        for (damping, solved), part in zip(found.items(), parts, strict=True)
    }


def _solved(train: Source, method: Method, means: Directions, dampings: Sequence[float]) -> list[Solved]:
    if isinstance(method, Gfim):  # its blocks are the same under each
        curvature = method.curvature(train)
        return [replace(method, damping=damping).solve_with(curvature, means) for damping in dampings]
    varied: list[Method] = [replace(method, damping=damping) for damping in dampings]  # type: ignore[type-var]
    return [one.solve(train, means) for one in varied]
