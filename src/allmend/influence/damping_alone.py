"""Hessian-free with each block divided by its damping: what a method comes to whose curvature hardly counts.

DataInf's correction of a record is of order 1 / n, so that within a block it orders records as Hessian-free does; its
sum over blocks is another one, since 1 / λ weights them. This tells the two effects apart.
"""

from dataclasses import dataclass

from allmend.influence.gradients import Source
from allmend.influence.methods import DAMPING, Directions, Solved, relative_damping


@dataclass(frozen=True)
class DampingAlone:
    """V = v / λ, with the λ of `DataInf`.

    Attributes:
        damping: c of λ = c tr F / (rd).
    """

    damping: float = DAMPING
    name: str = "hessian_free_scaled"

    def solve(self, train: Source, targets: Directions) -> Solved:
        lambdas = relative_damping(train, self.damping)
        found = {name: v / lambdas[name] for name, v in targets.items() if lambdas[name]}
        return Solved(found, lambdas, tuple(sorted(targets.keys() - found.keys())))
